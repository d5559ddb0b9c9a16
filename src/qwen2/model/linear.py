"""Linear layers, and several of them over the same input as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from qwen2.common.runtime import on_huge_pages
from qwen2.model import kernels


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (N, in) times weight (out, in), plus bias -> (N, out).

    One row of a decode step on the CPU is bound by reading the weight: see kernels.py.
    """
    return kernels.TABLE["bf16 row" if len(x) == 1 else "bf16 rows"](x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` through `linear`."""

    product = staticmethod(linear)

    def parts(self) -> dict[str, Tensor | None]:
        """What the product takes beside its input; each has a row for each output."""
        return {"weight": self.weight, "bias": self.bias}

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out)."""
        return linear(x, self.weight, self.bias)


class LinearLayer(Protocol):
    """What `Projections` joins: `Linear`, or `QuantisedLinear`."""

    out_features: int

    @property
    def weight(self) -> Tensor:
        """The numbers, (out, ...)."""

    @property
    def product(self) -> Callable[..., Tensor]:
        """The function of x (N, in) and `parts`."""

    def parts(self) -> dict[str, Tensor | None]:
        """What the product takes beside its input; each has a row for each output."""

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out)."""


class Projections:
    """Linear layers over the same input, which inference may compute as one.

    Once `fuse` has laid their weights end to end in memory, the layers' own parameters are views of
    that memory: names, values and size stay, and whoever moves or replaces a parameter afterwards
    is noticed, for then it lies elsewhere.
    """

    def __init__(self, *layers: LinearLayer) -> None:
        self.layers: Sequence[LinearLayer] = layers
        self.joint: tuple[Tensor | None, ...] = ()  # the layers' parts, end to end

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """x (N, in) -> (N, out) of each layer."""
        joint = self.together(x)
        if joint is None:
            return [layer(x) for layer in self.layers]
        return joint.split_with_sizes([layer.out_features for layer in self.layers], dim=-1)

    def together(self, x: Tensor) -> Tensor | None:
        """x (N, in) -> the outputs of all layers side by side; None, where that cannot be."""
        if torch.is_grad_enabled() or not self.fused:
            return None
        return self.layers[0].product(x, *self.joint)

    @property
    def fused(self) -> bool:
        """Whether the layers' weights lie where `fuse` has put them."""
        if not self.joint:
            return False
        weight = self.joint[0]
        assert weight is not None
        places = [layer.weight.data_ptr() for layer in self.layers]
        rows = [0, *(layer.out_features for layer in self.layers[:-1])]
        step = weight.stride(0) * weight.element_size()
        place = weight.data_ptr()
        for row, actual in zip(rows, places, strict=True):
            place += row * step
            if actual != place:
                return False
        return True

    @torch.no_grad()
    def fuse(self) -> None:
        """Lay the weights end to end, unless they lie so; the layers' parameters become views."""
        if self.fused:
            return
        self.joint = tuple(_join(group) if group else None for group in self.groups())

    def groups(self) -> list[list[Tensor]]:
        """Parameters that `fuse` lays end to end: a group for each of the layers' parts."""
        parts = zip(*(layer.parts().values() for layer in self.layers), strict=True)
        return [[p for p in part if p is not None] for part in parts]


def end_to_end(
    shapes: Sequence[torch.Size], dtype: torch.dtype, device: torch.device
) -> list[Tensor]:
    """Empty tensors in one piece of memory, one after the other along their first dimension."""
    rows = [shape[0] for shape in shapes]
    shape = (sum(rows), *shapes[0][1:])
    joint = on_huge_pages(torch.empty(shape, dtype=dtype, device=device))
    return list(joint.split(rows))


def _join(parameters: Sequence[Tensor]) -> Tensor:
    first, rows = parameters[0].data, sum(len(parameter) for parameter in parameters)
    place = first.storage_offset()
    together = True
    for parameter in parameters:
        same = parameter.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        together &= same and parameter.storage_offset() == place and parameter.is_contiguous()
        place += parameter.numel()
    if together:
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    joint = on_huge_pages(first.new_empty((rows, *first.shape[1:])))
    torch.cat([parameter.data for parameter in parameters], out=joint)
    for parameter, piece in zip(
        parameters, joint.split([len(parameter) for parameter in parameters]), strict=True
    ):
        parameter.data = piece
    return joint
