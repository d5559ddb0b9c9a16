"""Model FLOPs and the measured peak."""

from __future__ import annotations

import pytest
import torch

from qwen2.model.config import ModelConfig
from qwen2.train.flops import measure_matmul_peak, step_flops


def test_packed_documents_count_their_own_context(small: ModelConfig) -> None:
    alone = [step_flops(small, [length]) for length in (4, 12)]
    assert step_flops(small, [4, 12]) == pytest.approx(sum(alone))
    assert step_flops(small, [16]) > sum(alone)
    # 6 per multiplying parameter, and 12·C·T/2 a layer for causal attention.
    matmul = small.num_parameters() - small.vocab_size * small.hidden_size
    assert step_flops(small, [16]) == 16 * (6 * matmul + 6 * 2 * 16 * 16)


def test_the_peak_is_measured() -> None:
    assert measure_matmul_peak(torch.float32, torch.device("cpu"), seconds=0.01) > 1e8
