"""A run without its numbers: the model of a recipe on any number of ranks, in one process.

The model is built on torch's meta device, where tensors have shapes and no memory, divided by
`parallelise` over a process group that only pretends to have other ranks, and given the recipe's
optimizer and one step of it. What is measured is what a rank would hold: its local shards. It is
the first rank of each pipeline stage, whose shards are the largest: `torch.chunk`, by which FSDP
and tensor parallelism divide what does not come out even, gives the first ranks more.

Neither data, tokenizer nor `init` need be there, and nothing is written. Activations are plan.py's.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen2.common.runtime import parse_dtype
from qwen2.model.config import BYTES, ModelConfig
from qwen2.model.weights import on_meta
from qwen2.train.asked import Asked
from qwen2.train.mesh import Mesh
from qwen2.train.precision import MasterWeights
from qwen2.train.stage import StageRecipe, divided
from qwen2.train.world import World

SHARDED = ("fsdp", "efsdp")
"""Dimensions of the world's views over which a unit of FSDP is gathered."""


@dataclass(frozen=True)
class Holding:
    """What a rank keeps from step to step, in bytes."""

    stage: int  # of the pipeline
    parameters: int  # numbers, not bytes
    weights: int
    gradients: int
    optimizer: int
    gathered: dict[str, int]
    """Of the largest unit of each kind (root, layer, experts) while FSDP has it together."""

    @property
    def total(self) -> int:
        """Weights, gradients and optimizer state."""
        return self.weights + self.gradients + self.optimizer


@dataclass(frozen=True)
class DryRun:
    """A recipe's model on a resolved mesh."""

    model: ModelConfig
    mesh: Mesh
    holdings: list[Holding]  # of the first rank of each pipeline stage

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON has it."""
        return {
            "world_size": self.mesh.world_size,
            "mesh": self.mesh.model_dump(),
            "parameters": self.model.num_parameters(),
            "stages": [{**asdict(each), "total": each.total} for each in self.holdings],
        }


def dry_run(asked: Asked, world_size: int) -> DryRun:
    """Divide the model of `asked` among `world_size` ranks, none of which has to be there.

    Raises:
        UserError: the mesh does not fit the ranks, the model, or the rows of a step.
    """
    model, given = asked.model, asked.mesh or Mesh()
    for stretch in asked.recipe.plan:
        mesh = given.resolve(world_size, model, stretch.context)
        stretch.shared(mesh.dp, mesh.pp)
    ranks = range(0, world_size, world_size // mesh.pp)
    return DryRun(model, mesh, [holding(asked, mesh, rank) for rank in ranks])


def holding(asked: Asked, mesh: Mesh, rank: int) -> Holding:
    """What one rank of a resolved mesh keeps."""
    if mesh.world_size == 1:
        return _alone(asked.model, asked.recipe)
    with _pretended_group(rank, mesh.world_size):
        return _shared(asked.model, mesh, asked.recipe, rank * mesh.pp // mesh.world_size)


def _alone(config: ModelConfig, recipe: StageRecipe) -> Holding:
    """Of a run in one process: the model in the compute dtype, beside its masters."""
    model = on_meta(config)
    named = MasterWeights(model, parse_dtype(recipe.dtype)).masters
    masters = list(named.values())
    every = {id(p): p for p in (*masters, *model.parameters())}  # in fp32 they are the same
    gradients, state = _update(masters, recipe.optimizer.build(named))
    parameters = sum(p.numel() for p in masters)
    return Holding(0, parameters, _bytes(every.values()), gradients, state, {})


def _shared(config: ModelConfig, mesh: Mesh, recipe: StageRecipe, stage: int) -> Holding:
    """Of this rank among those of the default group."""
    loss = divided(config, recipe, World(mesh, torch.device("cpu")))
    named = dict(loss.model.named_parameters())
    gradients, state = _update(named.values(), recipe.optimizer.build(named))
    parameters = sum(_local(p).numel() for p in named.values())
    gathered = _gathered(named, BYTES[recipe.dtype])
    return Holding(stage, parameters, _bytes(named.values()), gradients, state, gathered)


def _update(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer) -> Any:
    """Bytes of gradients, and of the state that a step of `optimizer` leaves."""
    gradients = []
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter)
        gradients.append(parameter.grad)
    for group in optimizer.param_groups:
        if "fused" in group:  # a kernel that meta tensors do not have; its state is the same
            group.update(fused=False, foreach=False)
    optimizer.step()
    state = (value for values in optimizer.state.values() for value in values.values())
    return _bytes(gradients), _bytes(value for value in state if isinstance(value, Tensor))


def _gathered(named: dict[str, nn.Parameter], itemsize: int) -> dict[str, int]:
    """Bytes of the largest unit of each kind, with the padding of a gather."""
    units: dict[str, Counter[str]] = defaultdict(Counter)
    for name, parameter in named.items():
        assert isinstance(parameter, DTensor)
        place = re.match(r"model\.layers\.\d+(\.mlp\.experts\.)?", name)
        kind = "root" if place is None else "experts" if place.group(1) else "layer"
        mesh = parameter.device_mesh
        assert mesh.mesh_dim_names
        (ranks,) = (mesh.size(i) for i, n in enumerate(mesh.mesh_dim_names) if n in SHARDED)
        units[kind][place.group() if place else ""] += _local(parameter).numel() * ranks * itemsize
    return {kind: max(sizes.values()) for kind, sizes in units.items()}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(_local(tensor).nbytes for tensor in tensors)


def _local(tensor: Tensor) -> Tensor:
    """What this rank has of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def _pretended_group(rank: int, world_size: int) -> Iterator[None]:
    """A default group whose other ranks are not there and whose collectives do nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    assert not dist.is_initialized()
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
