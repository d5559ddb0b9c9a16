"""Norm and clipping of a gradient whose parts may lie on different meshes.

Weights of routed experts are sharded over other ranks than the rest (parallelise.py), and torch's
functions of many tensors at once refuse a list of both; here each mesh has a list of its own.
Without a mesh all are one list, and the result is torch's. Pipeline stages have other parameters
each, whose squared norms add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter

from qwen2.train.world import World

T = TypeVar("T", bound=Tensor)


def by_mesh(tensors: Iterable[T]) -> list[list[T]]:
    """Those of each mesh, and those of none, in their order."""
    found: dict[object, list[T]] = {}
    for tensor in tensors:
        mesh = tensor.device_mesh if isinstance(tensor, DTensor) else None
        found.setdefault(mesh, []).append(tensor)
    return list(found.values())


def total_norm(gradients: Sequence[Tensor], world: World) -> Tensor:
    """The 2-norm of whole gradients, a plain scalar that is the same on all ranks of `world`."""
    norms = [torch.nn.utils.get_total_norm(some) for some in by_mesh(gradients)]
    wholes = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    norm = wholes[0] if len(wholes) == 1 else torch.stack(wholes).norm()
    if world.mesh.pp > 1:
        norm = world.sum(norm.double().square(), "pp").sqrt().to(norm.dtype)
    return norm


def scale_gradients(parameters: Sequence[Parameter], most: float, norm: Tensor) -> None:
    """Scale gradients of `total_norm` `norm` to one of at most `most`, in place."""
    for some in by_mesh(parameters):
        torch.nn.utils.clip_grads_with_norm_(some, most, norm)
