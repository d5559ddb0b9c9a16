"""A step of ranks together against the same step of one process, in fp32.

Ranks of dp read different rows; a row has several documents, some of which cross from one rank of
cp to the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from qwen2.model.config import Mixture, ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.tokens.packing import PackedBatch
from qwen2.train.gradients import scale_gradients, total_norm
from qwen2.train.loss import IGNORE, OutputZ
from qwen2.train.mesh import Mesh
from qwen2.train.optimizers import AdamWConfig
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.parallelise import parallelise
from qwen2.train.recompute import Recompute, recompute_activations
from qwen2.train.router import RouterLosses
from qwen2.train.world import World

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
    router_aux_loss_coef=0.5,
)
MOE = {"moe": MIXTURE}
ROUTER_Z = 0.1
"""Large enough, as the other coefficient, for gradients to tell."""


def new_model(changes: dict[str, Any]) -> Qwen2:
    """A model whose weights, biases included, are large enough for gradients to tell apart."""
    model = Qwen2(ModelConfig(**{**SHAPE, **changes}))
    init_weights(model, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def new_world(sizes: dict[str, int], changes: dict[str, Any]) -> World:
    """All ranks, in a mesh of `sizes`."""
    config = ModelConfig(**{**SHAPE, **changes})
    return World(Mesh(**sizes).resolve(dist.get_world_size(), config, CONTEXT), CPU)


def new_batch(number: int) -> PackedBatch:
    """A micro-batch of a rank of dp; some of it is padding."""
    lengths = LENGTHS[number % 2]
    generator = torch.Generator().manual_seed(number)
    tokens, targets = torch.randint(61, (2, sum(lengths)), generator=generator)
    targets[-4 - number :] = IGNORE
    return PackedBatch(tokens, targets, torch.cat([torch.arange(n) for n in lengths]), lengths)


def joined(batches: list[PackedBatch]) -> PackedBatch:
    """One batch of all."""
    parts = ([getattr(b, name) for b in batches] for name in ("tokens", "targets", "positions"))
    tokens, targets, positions = map(torch.cat, parts)
    return PackedBatch(tokens, targets, positions, [n for b in batches for n in b.lengths])


def total_count(batches: list[PackedBatch]) -> int:
    """Targets of all batches."""
    return sum(int((batch.targets != IGNORE).sum()) for batch in batches)


class Step(NamedTuple):
    """The losses of a step, and what of its gradients is here."""

    loss: Tensor
    """This rank's part, and after it the parts of the z-loss."""
    held_out: Tensor
    """This rank's part of the same batches' cross-entropy, without gradients."""
    routers: RouterLosses | None
    gradients: dict[str, Tensor]

    def figures(self, world: World) -> dict[str, Any]:
        """What is logged of it."""
        loss, *z = world.sum(self.loss, "data").tolist()
        held_out = world.sum(self.held_out, "data").item()
        routers = self.routers.figures(world) if self.routers else {}
        return {"loss": loss, "z": z, "held_out": held_out, **routers}


def take_step(loss_of: PackedLoss, batches: list[PackedBatch], count: int, zeta: float) -> Step:
    """Gradients of a step's micro-batches; all losses are added that there are."""
    moe, z = loss_of.model.config.moe, OutputZ(zeta)
    tokens = sum(len(batch.tokens) for batch in batches)
    routers = RouterLosses(moe, ROUTER_Z, tokens) if moe else None
    with torch.no_grad():
        held_out = sum(loss_of(batch, count).double() for batch in batches)
    assert isinstance(held_out, Tensor)
    loss = loss_of.backward(batches, count, routers, z if zeta else None).item()
    parts = torch.tensor([loss, z.cross_entropy, z.square_log_z], dtype=torch.float64)
    return Step(parts, held_out, routers, gradients(loss_of.model))


def alone(changes: dict[str, Any], dp: int, micro_batches: int = 1, zeta: float = 0.1) -> Step:
    """The step over the batches of all ranks, in one process."""
    batches = [
        joined([new_batch(dp * number + rank) for rank in range(dp)])
        for number in range(micro_batches)
    ]
    return take_step(PackedLoss(new_model(changes)), batches, total_count(batches), zeta)


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


def compare(
    sizes: dict[str, int],
    changes: dict[str, Any],
    micro_batches: int = 1,
    recompute: Recompute = "none",
    zeta: float = 0.1,
) -> None:
    """In a rank: its share of the step, and the sum of all against one process."""
    world, model = new_world(sizes, changes), new_model(changes)
    dp = world.mesh.dp
    recompute_activations(model, recompute)
    loss_of = parallelise(model, world, torch.float32)
    batches = [new_batch(dp * number + world.dp_rank) for number in range(micro_batches)]
    count = total_count([new_batch(number) for number in range(dp * micro_batches)])
    step, expected = (
        take_step(loss_of, batches, count, zeta),
        alone(changes, dp, micro_batches, zeta),
    )
    wanted = expected.figures(World.alone(CPU))
    for name, figure in step.figures(world).items():
        assert figure == pytest.approx(wanted[name], rel=1e-5), name
    found = step.gradients
    names: list[list[str]] = [[]] * dist.get_world_size()
    dist.all_gather_object(names, list(found))
    assert set().union(*names) == expected.gradients.keys()
    for name in found:
        gradient = expected.gradients[name]
        assert gradient.abs().max() > 1e-4, f"{name}: nothing to compare"
        difference = (found[name] - gradient).abs().max()
        assert difference < 1e-5, f"{name}: {difference:.1e} of {gradient.abs().max():.1e}"
    norm = total_norm([p.grad for p in model.parameters() if p.grad is not None], world)
    expected_norm = torch.nn.utils.get_total_norm(list(expected.gradients.values()))
    assert norm.item() == pytest.approx(expected_norm.item(), rel=1e-5)
    scale_gradients(list(model.parameters()), norm.item() / 2, norm)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, found[name] / 2)
    other = new_model(changes)
    for name, parameter in other.named_parameters():
        parameter.grad = expected.gradients[name] / 2
    weights, expected_weights = updated(model), updated(other)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected_weights[name], atol=1e-5, rtol=1e-5)
