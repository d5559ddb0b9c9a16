"""Loss and gradients of ranks together against those of one process, in fp32.

Ranks of dp read different rows; a row has several documents, some of which cross from one rank of
cp to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwen2.common.errors import UserError
from qwen2.model.config import Mixture, ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.moe import Routing
from qwen2.tokens.packing import PackedBatch
from qwen2.train.gradients import scale_gradients, total_norm
from qwen2.train.loss import IGNORE
from qwen2.train.mesh import Mesh
from qwen2.train.optimizers import AdamWConfig
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.parallelise import parallelise
from qwen2.train.world import World

RunInRanks = Callable[..., list[Any]]
CPU = torch.device("cpu")
CONTEXT = 16
LENGTHS = [[5, 11, 3, 13, 16], [9, 7, 16, 2, 14]]
"""Documents of three rows, of a rank of dp; ranks of cp have one and a half rows, or less."""

SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

MIXTURE = Mixture(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
)
MOE = {"moe": MIXTURE}
SIX = {"moe": MIXTURE.model_copy(update={"num_experts": 6})}


def new_model(changes: dict[str, Any]) -> Qwen2:
    """A model whose weights, biases included, are large enough for gradients to tell apart."""
    model = Qwen2(ModelConfig(**{**SHAPE, **changes}))
    init_weights(model, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def new_batch(number: int) -> PackedBatch:
    """The batch of a rank of dp; some of it is padding."""
    lengths = LENGTHS[number % 2]
    generator = torch.Generator().manual_seed(number)
    tokens, targets = torch.randint(61, (2, sum(lengths)), generator=generator)
    targets[-4 - number :] = IGNORE
    return PackedBatch(tokens, targets, torch.cat([torch.arange(n) for n in lengths]), lengths)


def total_count(batches: list[PackedBatch]) -> int:
    """Targets of all batches."""
    return sum(int((batch.targets != IGNORE).sum()) for batch in batches)


class Expected(NamedTuple):
    """What one process computes."""

    loss: float
    routers: float
    gradients: dict[str, Tensor]


def alone(changes: dict[str, Any], dp: int) -> Expected:
    """The loss over the batches of all ranks and its gradients, in one process."""
    model, batches = new_model(changes), [new_batch(number) for number in range(dp)]
    lengths = [length for batch in batches for length in batch.lengths]
    parts = ([getattr(b, name) for b in batches] for name in ("tokens", "targets", "positions"))
    joint = PackedBatch(*map(torch.cat, parts), lengths)
    loss, routers = losses(PackedLoss(model), joint, total_count(batches))
    (loss + routers).backward()
    return Expected(loss.item(), routers.item(), gradients(model))


def losses(loss_of: PackedLoss, batch: PackedBatch, count: int) -> tuple[Tensor, Tensor]:
    """Cross-entropy, and what the routers of a mixture add to it."""
    moe = loss_of.model.config.moe
    routing = Routing(moe, CPU) if moe else None
    loss = loss_of(batch, count, routing)
    if routing is None:
        return loss, torch.zeros(())
    return loss, 0.5 * routing.balance_loss() + 0.1 * routing.z_loss()


def gradients(model: Qwen2) -> dict[str, Tensor]:
    """Whole gradients by name."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = whole(parameter.grad)
    return found


def updated(model: Qwen2) -> dict[str, Tensor]:
    """Whole weights by name after an update; `eps` is so large that rounding stays what it is."""
    AdamWConfig(lr=0.01, eps=0.01).build(dict(model.named_parameters())).step()
    return {name: whole(parameter) for name, parameter in model.named_parameters()}


def whole(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor, which may be divided."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def in_bf16(sizes: dict[str, int], changes: dict[str, Any]) -> None:
    """In a rank: weights and gradients stay in fp32 while the products are in bf16."""
    config = new_model(changes).config
    world = World(Mesh(**sizes).resolve(dist.get_world_size(), config, CONTEXT), CPU)
    seen = []
    for reshard in (True, False):
        model = new_model(changes)
        loss_of = parallelise(model, world, torch.bfloat16, reshard)
        count = total_count([new_batch(number) for number in range(world.mesh.dp)])
        loss = loss_of(new_batch(world.dp_rank), count)
        loss.backward()
        seen.append(world.sum(loss, "data").item())
    expected = alone(changes, world.mesh.dp)
    assert seen[0] == seen[1] != expected.loss
    assert seen[0] == pytest.approx(expected.loss, rel=1e-2)
    found = gradients(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    for name, gradient in expected.gradients.items():
        assert (found[name] - gradient).norm() < 0.05 * gradient.norm(), name
    with torch.no_grad():  # other kernels than with gradients
        held_out = world.sum(loss_of(new_batch(world.dp_rank), count), "data").item()
    assert held_out == pytest.approx(expected.loss, rel=1e-2)


def in_micro_batches(sizes: dict[str, int]) -> None:
    """In a rank: gradients of two batches, one after the other, add up to those of both."""
    model = new_model({})
    world = World(Mesh(**sizes).resolve(dist.get_world_size(), model.config, CONTEXT), CPU)
    loss_of = parallelise(model, world, torch.float32)
    batches = [new_batch(number) for number in range(2)]
    for batch in batches:
        loss_of(batch, total_count(batches)).backward()
    for name, gradient in alone({}, 2).gradients.items():
        torch.testing.assert_close(gradients(model)[name], gradient, atol=1e-5, rtol=1e-5)


def compare(sizes: dict[str, int], changes: dict[str, Any]) -> None:
    """In a rank: its share of the step, and the sum of all against one process."""
    mesh = Mesh(**sizes).resolve(dist.get_world_size(), new_model(changes).config, CONTEXT)
    world = World(mesh, CPU)
    model = new_model(changes)
    loss_of = parallelise(model, world, torch.float32)
    count = total_count([new_batch(number) for number in range(mesh.dp)])
    loss, routers = losses(loss_of, new_batch(world.dp_rank), count)
    (loss + routers).backward()
    expected = alone(changes, mesh.dp)
    assert world.sum(loss, "data").item() == pytest.approx(expected.loss, rel=1e-5)
    assert world.sum(routers, "stage").item() == pytest.approx(expected.routers, rel=1e-5)
    found = gradients(model)
    assert found.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert gradient.abs().max() > 1e-4, f"{name}: nothing to compare"
        difference = (found[name] - gradient).abs().max()
        assert difference < 1e-5, f"{name}: {difference:.1e} of {gradient.abs().max():.1e}"
    norm = total_norm([p.grad for p in model.parameters() if p.grad is not None])
    expected_norm = torch.nn.utils.get_total_norm(list(expected.gradients.values()))
    assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-5)
    scale_gradients(list(model.parameters()), norm.item() / 2, norm)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, found[name] / 2)
    other = new_model(changes)
    for name, parameter in other.named_parameters():
        parameter.grad = expected.gradients[name] / 2
    weights = updated(model)
    for name, weight in updated(other).items():
        torch.testing.assert_close(weights[name], weight, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param({}, {}, id="fsdp 2"),
        pytest.param({}, {"tie_word_embeddings": True}, id="fsdp 2, tied head"),
        pytest.param({"cp": 2}, {}, id="cp 2"),
        pytest.param({"cp": 2}, {"num_key_value_heads": 1}, id="cp 2, one kv head for both"),
        pytest.param({}, MOE, id="fsdp 2, mixture"),
        pytest.param({"ep": 2}, MOE, id="ep 2"),
        pytest.param({"tp": 2}, {}, id="tp 2"),
        pytest.param({"tp": 2}, {"tie_word_embeddings": True}, id="tp 2, tied head"),
        pytest.param({"tp": 2}, {"intermediate_size": 37}, id="tp 2, uneven"),
        pytest.param({"tp": 2}, MOE, id="tp 2, mixture"),
    ],
)
def test_two_ranks_compute_what_one_does(
    in_ranks: RunInRanks, sizes: dict[str, int], changes: dict[str, Any]
) -> None:
    in_ranks(2, compare, sizes, changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param({"dp_replicate": 2}, {}, id="hsdp 2 x 2"),
        pytest.param({"cp": 2}, {}, id="fsdp 2, cp 2"),
        pytest.param({"cp": 4}, {}, id="cp 4, two kv heads"),
        pytest.param({"ep": 2}, MOE, id="fsdp 4, ep 2"),
        pytest.param({"ep": 2}, SIX, id="fsdp 4, ep 2, three experts over two ranks"),
        pytest.param({"tp": 2}, {}, id="fsdp 2, tp 2"),
        pytest.param({"tp": 2}, {"tie_word_embeddings": True}, id="fsdp 2, tp 2, tied head"),
        pytest.param({"tp": 2}, {"intermediate_size": 37}, id="fsdp 2, tp 2, uneven"),
        pytest.param({"tp": 2, "cp": 2}, {}, id="cp 2, tp 2"),
        pytest.param({"tp": 2, "ep": 2}, MOE, id="fsdp 2, tp 2, ep 2"),
        pytest.param({"ep": 4, "cp": 2}, MOE, id="fsdp 2, cp 2, ep 4"),
        pytest.param({"ep": 2, "dp_replicate": 2}, MOE, id="hsdp 2 x 2, ep 2"),
    ],
)
def test_four_ranks_compute_what_one_does(
    in_ranks: RunInRanks, sizes: dict[str, int], changes: dict[str, Any]
) -> None:
    in_ranks(4, compare, sizes, changes)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param({}, {}, id="fsdp 2"),
        pytest.param({"tp": 2}, {}, id="tp 2"),
    ],
)
def test_products_in_bf16_and_sums_in_fp32(
    in_ranks: RunInRanks, sizes: dict[str, int], changes: dict[str, Any]
) -> None:
    in_ranks(2, in_bf16, sizes, changes)


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"cp": 2}], ids=["tp 2", "cp 2"])
def test_gradients_of_micro_batches_add_up(in_ranks: RunInRanks, sizes: dict[str, int]) -> None:
    in_ranks(2, in_micro_batches, sizes)


def in_stages() -> None:
    """In a rank: what cannot be done is refused before anything is divided."""
    model = new_model({})
    world = World(Mesh(pp=2).resolve(dist.get_world_size(), model.config, CONTEXT), CPU)
    with pytest.raises(UserError, match="pp 2"):
        parallelise(model, world, torch.float32)


def test_pipeline_stages_are_refused(in_ranks: RunInRanks) -> None:
    in_ranks(2, in_stages)
