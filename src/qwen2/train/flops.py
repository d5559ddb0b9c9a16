"""Model FLOPs utilisation: what a step computes, over what this machine's matmul can."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

from qwen2.model.config import ModelConfig


def measure_matmul_peak(dtype: torch.dtype, device: torch.device, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product: the median over about `seconds`.

    Of a small one where a large one would take too long: on a processor without instructions for
    bf16 a product of 2,048 takes 20 s.
    """
    size = 256
    while size < 2048 and 8 * _product_seconds(size, dtype, device) < seconds / 5:
        size *= 2
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 5 or time.perf_counter() - began < seconds:
        times.append(_product_seconds(size, dtype, device))
    return 2 * size**3 / statistics.median(times)


def _product_seconds(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of one product of that size, the second: the first also chooses the kernel."""
    a = torch.randn(size, size, device=device).to(dtype)
    b = torch.randn(size, size, device=device).to(dtype)
    a @ b
    _finish(device)
    start = time.perf_counter()
    a @ b
    _finish(device)
    return time.perf_counter() - start


def step_flops(config: ModelConfig, lengths: Sequence[int]) -> float:
    """Training FLOPs of a packed batch: each document counts its own context, padding none."""
    return sum(length * config.flops_per_token(length) for length in lengths)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
