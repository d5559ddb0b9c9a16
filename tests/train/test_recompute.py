from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2.model.config import DualChunk, Mixture, ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.tokens.packing import PackedBatch
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.recompute import Recompute, recompute_activations

MOE = Mixture(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=16,
)
LENGTHS = [40, 8, 16]


def model_of(small: ModelConfig, how: Recompute, dtype: torch.dtype, **changes: Any) -> Qwen2:
    model = Qwen2(small.model_copy(update=changes))
    init_weights(model, torch.Generator().manual_seed(0))
    model.to(dtype)
    recompute_activations(model, how)
    return model


def batch() -> PackedBatch:
    ids = torch.randint(0, 61, (sum(LENGTHS) + 1,), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    return PackedBatch(ids[:-1], ids[1:], positions, LENGTHS)


def loss_and_gradients(model: Qwen2) -> tuple[Tensor, dict[str, Tensor]]:
    loss = PackedLoss(model)(batch())
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"moe": MOE},
        {"dual_chunk": DualChunk(chunk_size=16, local_size=4)},
    ],
    ids=["dense", "tied", "moe", "dual chunk"],
)
def test_loss_and_gradients_are_the_same_bits(
    small: ModelConfig, how: Recompute, dtype: torch.dtype, changes: dict[str, Any]
) -> None:
    loss, gradients = loss_and_gradients(model_of(small, "none", dtype, **changes))
    again, found = loss_and_gradients(model_of(small, how, dtype, **changes))
    assert torch.equal(loss, again)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert torch.equal(gradient, found[name]), name


def test_names_of_parameters_stay(small: ModelConfig) -> None:
    plain = model_of(small, "none", torch.float32)
    assert [*model_of(small, "full", torch.float32).state_dict()] == [*plain.state_dict()]


def kept_bytes(model: Qwen2) -> int:
    """Of activations between forward and backward, each storage once; parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    held: list[Any] = []  # so that no memory is given out twice
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or note(t), lambda t: t):
        held.append(model.model(batch().tokens, batch().positions, model.packed(LENGTHS)))
    return sum(kept.values())


class Products(TorchDispatchMode):
    """Counts the matrix products that run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return func(*args, **(kwargs or {}))


def products(model: Qwen2) -> int:
    with Products() as counted:
        PackedLoss(model)(batch()).backward()
    return counted.count


def test_full_keeps_the_input_of_each_layer_and_runs_its_products_again(
    small: ModelConfig,
) -> None:
    plain, full = (model_of(small, how, torch.float32) for how in ("none", "full"))
    N, C, layers = sum(LENGTHS), small.hidden_size, small.num_hidden_layers
    assert kept_bytes(full) < kept_bytes(plain) / 3
    assert kept_bytes(full) > 4 * N * C * layers
    # q, k, v, o, gate and up of each layer; down only where something after it is needed
    assert products(full) - products(plain) in (6 * layers, 7 * layers)


def test_selective_runs_no_product_again(small: ModelConfig) -> None:
    plain, some = (model_of(small, how, torch.float32) for how in ("none", "selective"))
    assert products(some) == products(plain)
