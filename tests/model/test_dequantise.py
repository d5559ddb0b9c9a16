"""Every type's numbers equal the gguf package's, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES

from qwen2.model.dequantise import _FAST, can_dequantise, dequantise


def quantised(type_: Type, columns: int = 512) -> np.ndarray:
    """Random bytes: every pattern of bits, but for scales, which stay finite."""
    block, size = GGML_QUANT_SIZES[type_]
    blocks = np.random.default_rng(1).integers(0, 256, (3 * columns // block, size), np.uint8)
    halves = {Type.Q8_0: [0], Type.Q5_0: [0], Type.Q6_K: [208], Type.Q4_K: [0, 2]}
    for offset in halves[type_]:
        blocks[:, offset + 1] &= 0b10111011  # an exponent that is not all ones
    return blocks.reshape(3, -1)


@pytest.mark.parametrize("type_", _FAST, ids=lambda t: t.name)
def test_fast_types_equal_the_reference(type_: Type) -> None:
    rows = quantised(type_)
    numbers = dequantise(torch.from_numpy(rows), type_)
    assert numbers.shape == (3, 512)
    assert numbers.isfinite().all()
    assert torch.equal(numbers, torch.from_numpy(gguf.quants.dequantize(rows, type_)))


@pytest.mark.parametrize("type_", [Type.Q8_0, Type.Q5_0], ids=lambda t: t.name)
def test_quantised_numbers_come_back(type_: Type) -> None:
    array = np.random.default_rng(2).normal(size=(4, 256)).astype(np.float32)
    numbers = dequantise(torch.from_numpy(gguf.quants.quantize(array, type_)), type_).numpy()
    step = np.abs(array).max() / (127 if type_ == Type.Q8_0 else 16)
    assert np.abs(numbers - array).max() <= step * 1.01


def test_a_block_worked_by_hand() -> None:
    # Q8_0: d = 0.5, then -128, 127, 0...; Q5_0: d = 2, fifth bit of number 0 set, nibbles 3 and 5.
    q8 = bytes([0x00, 0x38, 0x80, 0x7F]) + bytes(30)
    assert dequantise(_row(q8), Type.Q8_0)[0, :3].tolist() == [-64.0, 63.5, 0.0]
    q5 = bytes([0x00, 0x40, 0x01, 0, 0, 0, 0x53]) + bytes(15)
    numbers = dequantise(_row(q5), Type.Q5_0)[0]
    assert [numbers[0], numbers[1], numbers[16]] == [2 * 3, 2 * -16, 2 * (5 - 16)]


def _row(data: bytes) -> torch.Tensor:
    return torch.tensor(list(data), dtype=torch.uint8)[None]


def test_integers_are_not_weights() -> None:
    assert not can_dequantise(Type.I32)
    assert all(can_dequantise(type_) for type_ in (*_FAST, Type.F16, Type.IQ4_XS, Type.Q2_K))
