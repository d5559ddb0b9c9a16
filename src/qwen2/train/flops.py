"""Model FLOPs utilisation: what a step computes, over what this machine's matmul can."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from qwen2.model.config import ModelConfig


def measure_matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product: the median over about `seconds`."""
    size = 2048
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    times: list[float] = []
    a @ b  # the first call also chooses and builds the kernel
    began = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < seconds:
        _finish(device)
        start = time.perf_counter()
        a @ b
        _finish(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def step_flops(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Training FLOPs of a packed batch: each document counts its own context, padding none."""
    return sum(length * config.flops_per_token(length) for length in lengths)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
