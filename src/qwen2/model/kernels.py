"""Which kernel does what: one table, made by measuring, see `tune` and `qwen2 doctor`.

An operation has several kernels that give the same result but for rounding. Which is the fastest
depends on the machine, so each is measured once on operands of a usual size, and the choice is kept
in a file of the user's cache. Before that, and for whoever does not ask, the first usable one is
taken. On CUDA there is nothing to choose here.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2.common.files import durable_write
from qwen2.model import native

if TYPE_CHECKING:
    from qwen2.model.cache import LayerKV

ROUNDS = 5
BLOCK = 512  # rows


@dataclass
class Operation:
    """A thing to be done, the kernels that can do it, the best first, and the one in use."""

    about: str
    kernels: Mapping[str, Callable[..., Tensor]]
    operands: Callable[[], tuple[Any, ...]]  # of a usual size, to measure with
    needs_native: frozenset[str] = frozenset()
    chosen: str = ""
    microseconds: dict[str, float] = field(default_factory=dict)

    def usable(self) -> list[str]:
        """Names of the kernels that work here."""
        return [n for n in self.kernels if n not in self.needs_native or native.is_fast()]

    def __call__(self, *operands: Any) -> Tensor:
        """Do it."""
        return self.kernels[self.chosen or self.usable()[0]](*operands)


def _matrix_vector(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mv(weight, x[0])[None]
    return torch.addmv(bias, weight, x[0])[None]


def _plain_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from qwen2.model.quantised_linear import int8_linear

    return int8_linear(x, weight, scale, bias)


def _native_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's integer product between our ways in and out of it.

    Blocks of rows, so that their sums are read again while they are in the processor's cache.
    """
    rows, row_scale = native.quantise(x)
    wide = None if bias is None else bias.float()
    out = torch.empty((len(x), len(weight)), dtype=torch.bfloat16)
    sums = torch.empty((min(len(x), BLOCK), len(weight)), dtype=torch.int32)
    for first in range(0, len(x), BLOCK):
        block = slice(first, first + BLOCK)
        some = sums[: len(x) - first]
        torch._int_mm(rows[block], weight.t(), out=some)
        native.scale_products(some, row_scale[block], scale, wide, out[block])
    return out


def _plain_int4(
    x: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None
) -> Tensor:
    from qwen2.model.quantised_linear import int4_linear

    return int4_linear(x, weight, scale, minimum, bias)


def _native_int4(
    x: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None
) -> Tensor:
    """A product in bf16, of activations as they are: many rows pay for dequantising."""
    return F.linear(x, native.dequantise_int4(weight, scale, minimum), bias)


def plain_swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (N, 2 I), which is written over -> silu(gate) * up (N, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)  # fresh memory costs a tenth of it


def _plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def plain_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads of x (N, H, D) by cos and sin (N, 1, D/2); see rope.py."""
    first, second = x.chunk(2, dim=-1)  # (N, H, D/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def choosable(x: Tensor) -> bool:
    """Whether there is a choice of kernels for x: in bf16 on the CPU, without gradients."""
    cpu = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return cpu and not torch.is_grad_enabled()


def _gathered_attention(q: Tensor, kept: LayerKV, place: Tensor | slice) -> Tensor:
    from qwen2.model.attention import causal_attention

    return causal_attention(q, *kept.read(place, q.dtype))


def _attention_operands() -> tuple[Any, ...]:
    from qwen2.model.cache import LayerKV

    return _bf16(512, 14, 64), LayerKV(_bf16(512, 2, 64), _bf16(512, 2, 64)), torch.arange(512)


def _bf16(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


N, K = 4864, 896  # the widths of the 0.5B, to measure with
TABLE = {
    "bf16 row": Operation(
        "product of one row with a bf16 weight",
        {"mv": _matrix_vector, "mm": F.linear},
        lambda: (_bf16(1, K), _bf16(N, K), None),
    ),
    "int8 rows": Operation(
        "product of many rows with an int8 weight",
        {"_int_mm, native around it": _native_int8, "_int_mm, PyTorch around it": _plain_int8},
        lambda: (_bf16(512, K), torch.ones(N, K, dtype=torch.int8), torch.ones(N), None),
        frozenset({"_int_mm, native around it"}),
    ),
    "int4 rows": Operation(
        "product of many rows with an int4 weight",
        {"native dequantised, bf16": _native_int4, "PyTorch, fp32": _plain_int4},
        lambda: (
            _bf16(512, K),
            torch.ones(N, K // 2, dtype=torch.uint8),
            *torch.ones(2, N, K // 32, dtype=torch.float16),
            None,
        ),
        frozenset({"native dequantised, bf16"}),
    ),
    "norm": Operation(
        "RMS norm of many rows",
        {"native": native.rms_norm, "PyTorch": _plain_norm},
        lambda: (_bf16(512, K), _bf16(K), 1e-6),
        frozenset({"native"}),
    ),
    "rotate": Operation(
        "rotation of the heads of many tokens",
        {"native": native.rotate, "PyTorch": plain_rotate},
        lambda: (_bf16(512, 14, 64), *torch.ones(2, 512, 1, 32, dtype=torch.bfloat16)),
        frozenset({"native"}),
    ),
    "swiglu": Operation(
        "silu(gate) * up",
        {"native": native.swiglu, "PyTorch": plain_swiglu},
        lambda: (_bf16(512, 2 * N),),
        frozenset({"native"}),
    ),
    "attention": Operation(
        "causal attention of many tokens over paged keys",
        {"native": native.attention, "gather and flash": _gathered_attention},
        _attention_operands,
        frozenset({"native"}),
    ),
}  # fmt: skip


def tune(again: bool = False) -> None:
    """Choose the fastest kernel of every operation: from the cache, or by measuring (`again`)."""
    path, key = _cache_file(), _key()
    known = {} if again else _read(path).get(key, {})
    if any(set(known.get(name, ())) != set(op.usable()) for name, op in TABLE.items()):
        with torch.inference_mode():
            known = {name: _measure(operation) for name, operation in TABLE.items()}
        _write(path, key, known)
    for name, operation in TABLE.items():
        operation.microseconds = times = known[name]
        operation.chosen = min(times, key=times.__getitem__)


def _measure(operation: Operation) -> dict[str, float]:
    """Microseconds of each usable kernel: medians of calls taken in turn."""
    operands = operation.operands()
    times: dict[str, list[float]] = {name: [] for name in operation.usable()}
    for turn in range(ROUNDS + 1):  # the first warms up
        for name, some in times.items():
            began = time.perf_counter()
            operation.kernels[name](*operands)
            if turn:
                some.append(time.perf_counter() - began)
    return {name: round(statistics.median(some) * 1e6, 1) for name, some in times.items()}


def _key() -> str:
    """What the measurements hold for."""
    from qwen2.common.hardware import processor

    kinds = "native" if native.is_fast() else "plain"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kinds}"


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen2" / "kernels.json"


def _read(path: Path) -> dict[str, dict[str, dict[str, float]]]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, key: str, known: dict[str, dict[str, float]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable_write(path, json.dumps({**_read(path), key: known}, indent=1).encode())
    except OSError:
        pass  # a cache that cannot be kept is measured again
