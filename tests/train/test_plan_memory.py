"""The closed forms against numbers by hand, built modules, and what autograd really saves."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwen2.model.config import PUBLISHED, Mixture, ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.moe import Routing
from qwen2.train.checkpoints import RunState, take, write
from qwen2.train.mesh import Mesh
from qwen2.train.plan_memory import (
    Work,
    activations,
    layer_activations,
    loss_block,
    moments,
    peak,
)
from qwen2.train.plan_parameters import (
    Stack,
    Weight,
    layer_parameters,
    root_parameters,
    stage_layers,
    stage_parameters,
    stage_shares,
)
from qwen2.train.pretrain import PretrainRecipe
from qwen2.train.recompute import Recompute, recompute_activations

DENSE = ModelConfig(
    vocab_size=320, hidden_size=96, intermediate_size=200, num_hidden_layers=2,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=512,
)  # fmt: skip
EXPERTS: dict[str, Any] = {
    "num_experts": 10, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}  # fmt: skip
ONE = Mesh(dp_shard=1)


class Living(TorchDispatchMode):
    """The storages that operators have made and that are still there, but for those `known`."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, operator: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self.sizes and key not in self.known:
                    self.sizes[key] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, key)
        return result


def saved_bytes(
    config: ModelConfig, dtype: torch.dtype, documents: list[int], recompute: Recompute
) -> int:
    """Bytes of the storages that the decoder's forward pass leaves for its backward pass."""
    model = Qwen2(config)
    init_weights(model, torch.Generator().manual_seed(0))
    model.to(dtype)
    recompute_activations(model, recompute)
    tokens = torch.randint(config.vocab_size, (sum(documents),))
    positions = torch.cat([torch.arange(length) for length in documents])
    routing = Routing(config.moe, model.device) if config.moe else None
    with Living([*model.parameters(), tokens]) as living:
        hidden = model.model(tokens, positions, model.packed(documents), routing)
    assert hidden.requires_grad
    return sum(living.sizes.values()) - hidden.nbytes + tokens.nbytes


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("documents", [[64], [40, 24]])
@pytest.mark.parametrize(
    "moe",
    [
        None,
        Mixture(**EXPERTS),
        Mixture(**EXPERTS | {"norm_topk_prob": True}),
        Mixture(**EXPERTS | {"shared_expert_intermediate_size": 0}),
    ],
    ids=["dense", "mixture", "normalised", "none shared"],
)
def test_activations_are_what_autograd_saves(
    moe: Mixture | None, documents: list[int], dtype: Any, recompute: Any
) -> None:
    config = DENSE.model_copy(update={"moe": moe})
    wide = torch.float32 if dtype == "fp32" else torch.bfloat16
    work = Work(config, ONE, 64, 1, 1, dtype, recompute, on_cpu=True)
    saved = saved_bytes(config, wide, documents, recompute)
    assert activations(work) == pytest.approx(saved, rel=0.02)


def test_a_layer_by_hand() -> None:
    # C = 96, I = 200, 6 heads of 16, 2 of keys, bf16; with fused norms a token's bytes are
    #   2 (96 b + 4) norms, 2 x 96 b their outputs, 3 x 96 b q, out and o_proj's input,
    #   2 x 32 b k and v, 6 x 4 lse, 4 x 200 b the feed-forward
    work = Work(DENSE, ONE, context=64, rows=2, micro_batches=1)
    assert layer_activations(work) == 128 * (2 * (192 + 4) + 2 * 192 + 3 * 192 + 128 + 24 + 1600)
    assert layer_activations(work, "selective") == 128 * (5 * 192 + 128 + 24 + 800)
    assert layer_activations(work, "full") == 128 * 192
    # tp halves all but the two gathered inputs; cp halves the tokens, and needs no more keys
    halves = Work(DENSE, Mesh(dp_shard=1, tp=2), context=64, rows=2, micro_batches=1)
    assert layer_activations(halves) == 128 * (392 + 576 + 128 + 24 + 1600) // 2 + 128 * 2 * 192
    shared = Work(DENSE, Mesh(dp_shard=1, cp=2), context=64, rows=2, micro_batches=1)
    assert layer_activations(shared) == layer_activations(work) // 2


def test_a_stage_holds_as_many_micro_batches_as_are_open() -> None:
    mesh = Mesh(dp_shard=1, pp=2)
    work = Work(DENSE, mesh, context=64, rows=1, micro_batches=4)
    layer, table = layer_activations(work), 64 * 16 * 2
    assert activations(work, 0) == 2 * (layer + table + 64 * 8)
    assert activations(work, 1) == layer + table + 64 * (192 + 4)


def test_the_logits_are_computed_in_even_blocks() -> None:
    # 4,096 rows of 152,064 logits in bf16 are 1.25e9 bytes: 5 blocks of at most 2^28, of 820 rows
    work = Work(PUBLISHED["72b"], ONE, context=4096, rows=1, micro_batches=1)
    assert loss_block(work) == (820 * 152_064 * 2, 5)


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize("sizes", [{}, {"pp": 4, "tp": 2, "dp_shard": 4}, {"cp": 2, "dp_shard": 8}])
def test_parameters_of_all_ranks_are_the_models(size: str, sizes: dict[str, int]) -> None:
    model = PUBLISHED[size]
    if model.tie_word_embeddings:
        sizes = sizes | {"pp": 1}
    mesh = Mesh(**{"dp_shard": 1, **sizes})
    stages = [stage_parameters(model, mesh, stage) for stage in range(mesh.pp)]
    assert sum(stage.total for stage in stages) == model.num_parameters()
    # On the ranks: what tp does not divide is there once for each of its ranks, and nothing is
    # missing; where all shares come out even, as in 72B, nothing is there twice.
    ranks = mesh.fsdp * mesh.tp
    kept = sum(stage.kept(mesh) for stage in stages) * ranks
    copies = sum(stage.whole.total for stage in stages) * (mesh.tp - 1)
    assert kept - copies >= model.num_parameters()
    if size == "72b":
        assert kept - copies == model.num_parameters()


def test_parameters_by_hand_and_in_the_module() -> None:
    # q and o 2 x 96², their bias 96, k and v 2 (96 x 32 + 32), MLP 3 x 96 x 200; two norms
    layer, root = layer_parameters(DENSE), root_parameters(DENSE)
    assert layer.total == 18_432 + 96 + 6_208 + 57_600 + 192
    assert (layer.whole.total, root.whole.total) == (192, 96)
    assert root.total == 2 * 320 * 96 + 96
    mixture = DENSE.model_copy(update={"moe": Mixture(**EXPERTS)})
    built = Qwen2(mixture).model.layers[0]
    experts = sum(p.numel() for p in built.mlp.experts.parameters())
    counted = layer_parameters(mixture)
    assert counted.experts.total == experts == 3 * 96 * 10 * 40
    assert counted.total == sum(p.numel() for p in built.parameters())
    # ep divides the experts that are gathered, not those that are kept: those fsdp divides anyway
    mesh = Mesh(dp_shard=4, ep=2)
    assert counted.gathered(mesh) == counted.total - experts // 2
    assert counted.kept(mesh) == counted.kept(Mesh(dp_shard=4))


def test_uneven_shares_are_those_of_the_first_rank() -> None:
    # 10 rows over tp 2 and fsdp 4: 5 rows, of which the first rank has 2
    assert Weight(10, 3).kept(Mesh(dp_shard=4, tp=2)) == 2 * 3
    assert Weight(10, 3, "width").kept(Mesh(dp_shard=4, tp=2)) == 3 * 2
    assert Weight(1, 8, "none").kept(Mesh(dp_shard=4)) == 8
    # 6 experts over 4 ranks: each has 3 of the 12 rows of all; 10 rows would not come out even
    assert Stack(6, 12, 5).kept(Mesh(dp_shard=4)) == 6 * 3 * 5
    assert Stack(6, 10, 5).kept(Mesh(dp_shard=4)) == 2 * 10 * 5


def test_layers_of_stages() -> None:
    assert stage_layers(28, 8) == [4, 4, 4, 4, 3, 3, 3, 3]
    assert stage_layers(80, 4) == [20] * 4


@pytest.mark.parametrize(("dtype", "bytes_each"), [("fp32", 16), ("bf16", 18)])
def test_one_process_at_its_update(dtype: Any, bytes_each: int) -> None:
    """Masters, two moments and gradients in fp32, and the model beside them in bf16."""
    work = Work(DENSE, ONE, context=8, rows=1, micro_batches=1, dtype=dtype)
    *_, update = moments(work)
    assert update.total == bytes_each * DENSE.num_parameters()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_checkpoint_beside_training_is_copies_and_a_file(kind: Any, tmp_path: Path) -> None:
    """Of what the first save leaves; its file, of all moments here, may be written at the peak."""
    recipe = PretrainRecipe.parse(
        {
            "model": DENSE.model_dump(), "data": "none", "tokenizer": "none", "out": "none",
            "context": 8, "rows": 1, "steps": 1, "optimizer": {"kind": kind, "lr": 1e-3},
        },
        "recipe",
    )  # fmt: skip
    masters = dict(Qwen2(DENSE).named_parameters())
    optimizer = recipe.optimizer.build(masters)
    for master in masters.values():
        master.grad = torch.zeros_like(master)
    optimizer.step()
    moment = take(RunState(1), masters, optimizer, {}, recipe, DENSE)
    kept = [sum(t.nbytes for t in some.values()) for some in (moment.weights, moment.optimizer)]
    largest = max(path.stat().st_size for path in write(moment, tmp_path))
    plain = Work(DENSE, ONE, 8, 1, 1, optimizer=kind, on_cpu=True)
    beside = replace(plain, async_checkpoints=True)
    needed = peak(beside).total - peak(plain).total
    assert needed == peak(beside).checkpoint == pytest.approx(sum(kept) + largest, rel=0.01)
    assert peak(replace(beside, on_cpu=False)) == peak(replace(plain, on_cpu=False))


def test_sharded_state_is_a_share_and_two_layers_are_gathered() -> None:
    mesh = Mesh(dp_shard=8)
    work = Work(PUBLISHED["7b"], mesh, context=4096, rows=1, micro_batches=2)
    memory = peak(work)
    parameters = PUBLISHED["7b"].num_parameters()
    assert memory.weights == 4 * parameters / 8
    assert memory.optimizer == 8 * parameters / 8
    layer, root = layer_parameters(work.model).total, root_parameters(work.model).total
    assert max(moment.gathered for moment in moments(work)) == 2 * (2 * layer + root)
    # The last moment is the update: nothing is left but state and gradients.
    *_, update = moments(work)
    assert update.total == 16 * parameters / 8


def test_the_moments_of_a_sharded_step_by_hand() -> None:
    model, mesh = PUBLISHED["7b"], Mesh(dp_shard=8)
    work = Work(model, mesh, context=4096, rows=1, micro_batches=1)
    layer, root = layer_parameters(model).total, root_parameters(model).total
    head, saved = 2 * 152_064 * 3584, layer_activations(work)
    own, kept = layer // 8, stage_shares(model, mesh, 0).kept
    loss, back, first, second, last, embedding, reduction, update = moments(work)
    # The last layer's gather is held until the loss is there, the same is fetched for going back.
    assert loss.gathered == back.gathered == 2 * root
    assert loss.buffers == back.buffers == 2 * layer
    assert loss.gradients == back.gradients == 0
    # Going back: two layers, but for the last one; 4 bytes a number of the layer reduced before.
    assert [m.gathered for m in (first, second, last)] == [
        2 * (root + 2 * layer), 2 * (root + 2 * layer), 2 * (root + layer),
    ]  # fmt: skip
    assert [m.buffers for m in (first, second, last)] == [0, 4 * layer, 4 * layer]
    assert [m.gradients for m in (first, second, last)] == [
        head + 2 * layer + 4 * done * own for done in (0, 1, 27)
    ]
    assert first.activations - second.activations == saved
    # The embedding's gradient meets that of the head, which waits; both are reduced in fp32.
    assert embedding.gradients == 4 * 28 * own + 2 * root
    assert (embedding.activations, reduction.gathered, reduction.buffers) == (0, 0, 6 * root)
    assert reduction.gradients == update.gradients == 4 * kept
    # On the CPU gloo sums in a copy, while the head's gradient is held; a rank alone has no layer
    # ahead, and divides into a copy.
    *_, reduction, _ = moments(replace(work, on_cpu=True))
    assert reduction.buffers == 8 * root + head
    *_, reduction, _ = whole = list(moments(replace(work, mesh=Mesh(dp_shard=1, dp_replicate=8))))
    assert max(m.gathered for m in whole) == 2 * (root + layer)
    assert reduction.buffers == 8 * root


def test_a_mixtures_experts_are_gathered_apart() -> None:
    work = Work(PUBLISHED["57b-a14b"], Mesh(dp_shard=8), context=4096, rows=1, micro_batches=1)
    counts, root = layer_parameters(work.model), root_parameters(work.model).total
    rest = counts.total - counts.experts.total
    assert max(m.gathered for m in moments(work)) == 2 * (root + counts.total + rest)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [{}, {"dp_shard": 2}, {"dp_replicate": 2}, {"tp": 2}, {"cp": 2}, {"pp": 2}, {"ep": 2}],
    ids=str,
)
def test_the_peak_is_that_of_the_processes(mesh: dict[str, int]) -> None:
    """Of real steps in processes of their own, whose allocator gives back what is freed."""
    from plan_memory import MIXTURE, measure, predicted

    model: dict[str, Any] = {"num_hidden_layers": 2} | (MIXTURE if "ep" in mesh else {})
    mesh = mesh | ({"dp_shard": 2} if "ep" in mesh else {})
    case: dict[str, Any] = {"rows": 1, "accumulation": 2, "mesh": mesh, "model": model}
    assert predicted(case) == pytest.approx(measure(True, case), rel=0.1)
