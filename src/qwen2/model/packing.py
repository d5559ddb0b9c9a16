"""Numbers in 8 and in 4 bits: how they are scaled, and how they lie in memory.

    int8   w = q · scale, q in -127..127, a scale for each row
    int4   w = q · scale + minimum, q in 0..15, both for each group of 32 neighbours of a row

Each 64 numbers of an int4 row are 32 bytes: the low nibbles are numbers 0 to 31, the high ones 32
to 63, so that a vector register holds a group in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
"""Neighbours of a row that share scale and minimum in int4."""

CHUNK = 2 * GROUP
"""Numbers of an int4 row that are packed together; K must be a multiple."""

_LEAST = 1e-30
"""Rows of smaller numbers are zeros: their scale would leave fp32."""

Parts = tuple[Tensor, ...]
"""The tensors of a weight: numbers, scale and, in int4, minimum."""


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., N, K) -> int8 (..., N, K) and scale (..., N) in fp32; halves go to even."""
    x = x.float()
    largest = x.abs().amax(-1).clamp_min_(_LEAST)
    return (x * (127 / largest)[..., None]).round_().to(torch.int8), largest / 127


def dequantise_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 (..., N, K), scale (..., N) -> (..., N, K) in fp32."""
    return weight.float().mul_(scale[..., None])


def dequantise_int4(weight: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """uint8 (..., N, K / 2), scale and minimum (..., N, K / 32) -> (..., N, K) in fp32."""
    groups = unpack_int4(weight).unflatten(-1, (-1, GROUP)).float()
    return groups.mul_(scale.float()[..., None]).add_(minimum.float()[..., None]).flatten(-2)


def pack_int4(numbers: Tensor) -> Tensor:
    """uint8 numbers 0..15 (..., K) -> (..., K / 2) bytes; see the module for their order."""
    low, high = numbers.unflatten(-1, (-1, 2, GROUP)).unbind(-2)  # (..., K / 64, 32)
    return (low | high << 4).flatten(-2)


def unpack_int4(packed: Tensor) -> Tensor:
    """The reverse of `pack_int4`: (..., K / 2) bytes -> (..., K) numbers."""
    chunks = packed.unflatten(-1, (-1, GROUP))
    return torch.stack((chunks & 15, chunks >> 4), dim=-2).flatten(-3)


def round_int4(weight: Tensor) -> Parts:
    """Each group between its least and its greatest number: the plainest int4 there is."""
    groups = weight.float().unflatten(-1, (-1, GROUP))
    least, greatest = groups.aminmax(dim=-1)
    return encode_int4(groups, (greatest - least) / 15, least)


def encode_int4(groups: Tensor, scale: Tensor, minimum: Tensor) -> Parts:
    """The parts of groups (..., K / 32, 32), each number rounded by scales as fp16 holds them."""
    scale, minimum = scale.half(), minimum.half()
    step = scale.float()[..., None]
    numbers = ((groups - minimum.float()[..., None]) / step.where(step != 0, 1)).round_()
    return pack_int4(numbers.clamp_(0, 15).to(torch.uint8).flatten(-2)), scale, minimum
