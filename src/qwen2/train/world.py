"""The world of a run: its ranks, the groups in which they talk, and what this one of them is.

Started by `torchrun`, a process finds its number and that of the others in its environment; started
plainly, it is a world of its own without any group, and all sums below are what they are given.

All meshes are views of one line of ranks, cut up as the recipe's mesh says (mesh.py):

    rows      pp, dp, cp, tp                    who reads which rows, and which tokens of them
    dense     pp, dp_replicate, fsdp, tp        who keeps which part of the weights
    sparse    pp, dp_replicate, efsdp, ep       the same of routed experts; efsdp x ep = fsdp x tp
    data      pp, data, tp                      data: ranks whose losses add up, dp x cp
    stage     pp, stage                         all ranks of a pipeline stage
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from qwen2.common.config import one_line
from qwen2.common.errors import UserError
from qwen2.common.runtime import pick_device
from qwen2.model.config import ModelConfig
from qwen2.train.mesh import Mesh

TIMEOUT = timedelta(minutes=10)
"""How long a rank waits for the others: a checkpoint or an evaluation of one of them included."""

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class Place:
    """A process among those of a run, and among those of its host."""

    rank: int
    size: int
    local_rank: int


def find_place(environment: Mapping[str, str] = os.environ) -> Place | None:
    """What `torchrun` says of this process; None when it was not started by it.

    Raises:
        UserError: only some of its variables are there, or one is no number.
    """
    missing = [name for name in VARIABLES if name not in environment]
    if len(missing) == len(VARIABLES):
        return None
    if missing:
        raise UserError(
            f"environment: {', '.join(missing)} not set, but others of {', '.join(VARIABLES)} are; "
            "start the run with torchrun, which sets all, or unset all"
        )
    values = [environment[name] for name in VARIABLES]
    if not all(value.isdecimal() for value in values):
        said = ", ".join(f"{n}={v}" for n, v in zip(VARIABLES, values, strict=True))
        raise UserError(f"environment: {said}: no numbers; start the run with torchrun")
    return Place(*map(int, values))


class World:
    """The ranks of a run over a resolved mesh, as one of them sees it.

    More than one rank, or one with a process group, needs torch's default group to exist.
    """

    def __init__(self, mesh: Mesh, device: torch.device) -> None:
        self.mesh, self.device = mesh, device
        self.views: dict[str, DeviceMesh] = {}
        if not dist.is_initialized():
            assert mesh.world_size == 1
            return
        assert mesh.world_size == dist.get_world_size()
        line = init_device_mesh(device.type, (mesh.world_size,), mesh_dim_names=("world",))
        pp, tp, rep = mesh.pp, mesh.tp, mesh.dp_replicate
        for name, sizes in {
            "rows": {"pp": pp, "dp": mesh.dp, "cp": mesh.cp, "tp": tp},
            "dense": {"pp": pp, "dp_replicate": rep, "fsdp": mesh.fsdp, "tp": tp},
            "sparse": {
                "pp": pp,
                "dp_replicate": rep,
                "efsdp": mesh.fsdp * tp // mesh.ep,
                "ep": mesh.ep,
            },
            "data": {"pp": pp, "data": mesh.dp * mesh.cp, "tp": tp},
            "stage": {"pp": pp, "stage": mesh.world_size // pp},
        }.items():
            self.views[name] = line._unflatten(0, tuple(sizes.values()), tuple(sizes))
        # Sums over both dimensions of a weight are then one collective.
        self.views["dense"]["fsdp", "tp"]._flatten("weights")
        self.views["sparse"]["efsdp", "ep"]._flatten("experts")

    @classmethod
    def alone(cls, device: torch.device) -> World:
        """One process, whatever groups it may be in."""
        world = cls.__new__(cls)
        world.mesh, world.device, world.views = Mesh(dp_shard=1), device, {}
        return world

    @property
    def is_first(self) -> bool:
        """Whether this rank is the one that writes and speaks for all."""
        return not self.views or dist.get_rank() == 0

    @property
    def dp_rank(self) -> int:
        """Which of the `mesh.dp` shares of the rows this rank reads; the loader's rank."""
        return self.views["rows"].get_local_rank("dp") if self.views else 0

    def sum(self, value: Tensor, over: Literal["dp", "data", "stage"]) -> Tensor:
        """`value`, without its gradient, summed over ranks.

        over: `dp`, for what is counted in the rows that a rank reads; `data`, for what it computes
            of its tokens, the same on all ranks of tp (the loss); `stage`, for what each rank
            computes of tokens that no other has (what a router did).
        """
        total = value.detach().to(self.device, copy=True)
        if self.views:
            view = "rows" if over == "dp" else over
            dist.all_reduce(total, group=self.views[view].get_group(over))
        return total

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any rank; all must ask."""
        if not self.views:
            return flag
        found = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)


@contextmanager
def open_world(
    mesh: Mesh, model: ModelConfig, context: int, device: str = "auto"
) -> Iterator[World]:
    """The world of this process, whose groups end with the block.

    On CUDA each process of a host takes a device of its own. `context`: tokens of a row.

    Raises:
        UserError: the mesh wants another number of ranks or does not fit the model, or the
            environment is not torchrun's; every rank says so before it waits for another.
    """
    place = find_place()
    resolved = mesh.resolve(place.size if place else 1, model, context)
    chosen = pick_device(device)
    if place is None:
        yield World(resolved, chosen)
        return
    if chosen.type == "cuda":
        chosen = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    try:
        yield World(resolved, chosen)
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise UserError(
            f"rank {place.rank}: another rank is gone, whose own message says why "
            f"({one_line(error)}); the same command again goes on from the newest checkpoint"
        ) from error
    finally:
        dist.destroy_process_group()


def _lost(error: RuntimeError) -> bool:
    """Whether it is of the connection to another rank; gloo's errors have no type of their own."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)
