"""Quantised blocks of GGUF files to numbers.

The types of the usual files (Q4_K_M and its kin) are done here in torch, about fifteen times faster
than in the `gguf` package, which does the others and is the reference for all in the tests. Block
layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h. What makes it fast: four or
eight small numbers are cut out of one integer at a time, and nothing leaves the processor's cache.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize as reference
from torch import Tensor

_NIBBLES = 0x0F0F0F0F
_CRUMBS = 0x03030303


def can_dequantise(type_: Type) -> bool:
    """Whether `type_` is a number format of weights: I32, for one, is not."""
    _, size = GGML_QUANT_SIZES[type_]
    try:
        reference(np.zeros((1, size), np.uint8), type_)
    except NotImplementedError:
        return False
    return True


def dequantise(rows: Tensor, type_: Type) -> Tensor:
    """Rows of blocks (R, bytes), uint8 -> numbers (R, columns), fp32."""
    if type_ not in _FAST:
        with np.errstate(all="ignore"):  # scales that are not finite are the file's own affair
            return torch.from_numpy(reference(rows.numpy(), type_))
    _, size = GGML_QUANT_SIZES[type_]
    return _FAST[type_](rows.reshape(-1, size)).view(len(rows), -1)


def _q8_0(blocks: Tensor) -> Tensor:
    """34 bytes: the scale d, 32 int8."""
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _q5_0(blocks: Tensor) -> Tensor:
    """22 bytes: d, the fifth bits of 32 numbers, their 16 bytes of nibbles: d·(q - 16)."""
    low, high = _nibbles(_words(blocks, 6, 22))  # (n, 4) words each: numbers 0-15 and 16-31
    q = torch.cat((low, high), dim=1)
    fifth = _FIFTH_BITS.index_select(0, blocks[:, 2:6].int().view(-1)).view(-1, 4)
    q.view(torch.int64).bitwise_or_(fifth)
    return q.view(torch.int8).float().mul_(_half(blocks, 0))


def _q6_k(blocks: Tensor) -> Tensor:
    """210 bytes: low nibbles, high pairs of bits, 16 scales, d: d·scale·(q - 32)."""
    low, high = _nibbles(_words(blocks, 0, 128).view(-1, 2, 16))  # (n, half, 16 words)
    q = torch.cat((low, high), dim=2).view(-1, 2, 4, 8)
    pairs = _words(blocks, 128, 192).view(-1, 2, 8)
    for i in range(4):
        q[:, :, i] |= ((pairs >> 2 * i) & _CRUMBS) << 4
    scale = blocks[:, 192:208].view(torch.int8).float().mul_(_half(blocks, 208))  # (n, 16)
    numbers = q.view(-1, 64).view(torch.uint8).float().sub_(32)
    return numbers.view(-1, 16, 16).mul_(scale[:, :, None])


def _q4_k(blocks: Tensor) -> Tensor:
    """144 bytes: d, d_min, 8 scales and 8 minima of 6 bits, nibbles: d·scale·q - d_min·min."""
    low, high = _nibbles(_words(blocks, 16, 144).view(-1, 4, 8))  # (n, 4, 8 words)
    q = torch.stack((low, high), dim=2).view(-1, 64).view(torch.uint8).float().view(-1, 8, 32)
    first, second, third = _words(blocks, 4, 16).unbind(1)  # (n,)
    low, high = _nibbles(third)
    pairs = 0x30303030
    scales = torch.stack((first & 0x3F3F3F3F, low | (first >> 2) & pairs), dim=1)
    minima = torch.stack((second & 0x3F3F3F3F, high | (second >> 2) & pairs), dim=1)
    scale = scales.view(torch.uint8).float().mul_(_half(blocks, 0))  # (n, 8)
    minimum = minima.view(torch.uint8).float().mul_(_half(blocks, 2))
    return q.mul_(scale[:, :, None]).sub_(minimum[:, :, None])


def _half(blocks: Tensor, offset: int) -> Tensor:
    """The fp16 at `offset` of every block, (n, 1) in fp32."""
    return blocks[:, offset : offset + 2].view(torch.float16).float()


def _words(blocks: Tensor, start: int, stop: int) -> Tensor:
    """A copy of some bytes of every block as int32, (n, words)."""
    halves = blocks[:, start:stop].view(torch.int16)
    return halves.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _nibbles(words: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high nibble of each byte, as bytes of words again."""
    return words & _NIBBLES, (words >> 4) & _NIBBLES


def _fifth_bits() -> Tensor:
    """For a byte, 8 bytes to be or-ed onto nibbles: 0 for a 1, else -16 (the high nibble ones)."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return torch.from_numpy(np.where(bits, 0, 0xF0).astype(np.uint8)).view(torch.int64).view(-1)


_FIFTH_BITS = _fifth_bits()

_FAST: dict[Type, Callable[[Tensor], Tensor]] = {
    Type.Q8_0: _q8_0,
    Type.Q5_0: _q5_0,
    Type.Q6_K: _q6_k,
    Type.Q4_K: _q4_k,
}
