"""Bindings of kernels.cpp, which is compiled when the package is installed and a compiler is there.

Without it, or on a processor that it was not compiled for, `why_not` says so and PyTorch's own
operators do the work; where both are there, kernels.py chooses. The whole pass over a few tokens is
in decode_step.py.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import threading
from ctypes import Structure, byref, c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from qwen2.model.cache import LayerKV


BF16, INT8, INT4 = range(3)  # the formats of kernels.cpp
TILE, CHUNK = 4, 64  # a matrix's rows and columns are multiples
MOST_D = 256  # units of a head
_LOCK = threading.Lock()  # the kernels have one set of threads and scratch memory


class Matrix(Structure):
    """A weight (n, k) in a format; see kernels.cpp."""

    _fields_ = [
        ("format", c_int32), ("n", c_int32), ("k", c_int32),
        *((name, c_void_p) for name in ("weight", "scale", "sums", "group_scale", "group_minimum")),
        ("bias", c_void_p),
    ]  # fmt: skip


@cache
def _library() -> ctypes.CDLL | str:
    """The compiled kernels, or why they cannot be used."""
    endings = importlib.machinery.EXTENSION_SUFFIXES
    here = Path(__file__).parent
    path = next((p for p in (here / f"_kernels{end}" for end in endings) if p.exists()), None)
    if path is None:
        return "not compiled: no C++ compiler was there when the package was installed"
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    library.needs.restype = c_char_p
    missing = set(library.needs().decode().split()) - _processor_flags()
    if missing:
        return f"compiled for another processor, with {', '.join(sorted(missing))}"
    return library


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux: it was compiled here, most likely
        return {"avx2", "fma", *_AVX512}
    return next((set(x.split(":")[1].split()) for x in lines if x.startswith("flags")), set())


_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16"}


def why_not() -> str | None:
    """Why the kernels cannot be used here; None if they can."""
    library = _library()
    return library if isinstance(library, str) else None


def is_fast() -> bool:
    """Whether the kernels are there, with their vector instructions."""
    library = _library()
    return not isinstance(library, str) and bool(library.fast())


def call(name: str, *arguments: Any) -> None:
    """Call a function of kernels.cpp, as many threads as torch has at work in it."""
    library = _library()
    assert not isinstance(library, str), library
    with _LOCK:
        library.set_threads(torch.get_num_threads())
        getattr(library, name)(*arguments)


def _at(tensor: Tensor) -> c_void_p:
    assert tensor.is_contiguous()
    return c_void_p(tensor.data_ptr())


# ------------------------------------------------------------------------------ single operators


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """x bf16 (M, K) -> int8 (M, K) and scale fp32 (M,); see `quantise_rows`."""
    M, K = x.shape
    out = torch.empty((M, K), dtype=torch.int8)
    scale = torch.empty(M)
    call("quantise", _at(x), M, K, _at(out), _at(scale))
    return out, scale


def scale_products(
    products: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Integer products (M, N), scales (M,) and (N,), bias fp32 (N,) -> out, bf16 (M, N)."""
    M, N = products.shape
    call(
        "scale_products", _at(products), _at(x_scale), _at(w_scale),
        _at(bias) if bias is not None else None, M, N, _at(out),
    )  # fmt: skip


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up bf16 (M, 2 I) -> silu(gate) * up, bf16 (M, I)."""
    M, width = gate_up.shape
    out = torch.empty((M, width // 2), dtype=torch.bfloat16)
    call("swiglu", _at(gate_up), M, width // 2, _at(out))
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (N, C) and weight (C,), bf16 -> bf16 (N, C)."""
    N, C = x.shape
    out = torch.empty((N, C), dtype=torch.bfloat16)
    call("norm", _at(x), _at(weight), N, C, c_float(eps), _at(out))
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads of x (N, H, D), whose rows may lie apart, by cos and sin (N, 1, D/2); all bf16."""
    N, H, D = x.shape
    if x.stride()[1:] != (D, 1):
        x = x.contiguous()
    out = torch.empty((N, H, D), dtype=torch.bfloat16)
    place, stride = c_void_p(x.data_ptr()), c_int64(x.stride(0))
    call("rotate_heads", place, stride, _at(cos), _at(sin), N, H, D, _at(out))
    return out


class Store(Structure):
    """A layer's keys and values; see kernels.cpp."""

    _fields_ = [
        (name, c_void_p)
        for name in ("keys", "values", "key_scale", "value_scale", "bias", "cos", "sin")
    ]

    @classmethod
    def of(cls, kept: LayerKV) -> Self:
        """The places of its tensors, which must outlive it."""
        *tensors, angles = kept
        places = [None if t is None else _at(t) for t in (*tensors, *(angles or (None, None)))]
        return cls(*places)


def attention(q: Tensor, kept: LayerKV, place: Tensor | slice) -> Tensor:
    """Causal attention of the last N of S tokens of a sequence, in bf16.

    q (N, H, D), rotated; `place` (S,): the tokens' slots in what is kept of the layer -> (N, H, D).
    """
    N, H, D = q.shape
    if isinstance(place, slice):
        place = torch.arange(place.start, place.stop)
    out, slots = torch.empty_like(q), place.int()
    call(
        "attention", _at(q), byref(Store.of(kept)), _at(slots),
        N, len(slots), H, kept.keys.shape[1], D, _at(out),
    )  # fmt: skip
    return out


def can_attend(q: Tensor, kept: LayerKV) -> bool:
    """Whether `attention` takes such heads, kept in such a type."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and kept.keys.dtype in (torch.bfloat16, torch.int8)
        and q.shape[-1] % 32 == 0
        and q.shape[-1] <= MOST_D
        and is_fast()
    )


def dequantise_int4(weight: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The parts of an int4 weight, see quantised_linear.py -> bf16 (N, K)."""
    N, K = len(weight), 2 * weight.shape[1]
    out = torch.empty((N, K), dtype=torch.bfloat16)
    call("dequantise_int4", _at(weight), _at(scale), _at(minimum), N, K, _at(out))
    return out


def product(x: Tensor, weight: Weight) -> Tensor:
    """x fp32 (M, K) times `weight` (N, K) -> fp32 (M, N)."""
    out = torch.empty((len(x), weight.matrix.n))
    call("product", byref(weight.matrix), _at(x), len(x), _at(out))
    return out


class Weight:
    """A weight as the kernels take it, and the tensors that it points into.

    Of an `embedding` rows are looked up and no product is taken: nothing of it is read here, so
    that all but the rows that come stay in their file.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None = None,
        minimum: Tensor | None = None,
        bias: Tensor | None = None,
        *,
        embedding: bool = False,
    ) -> None:
        format_ = BF16 if scale is None else INT8 if minimum is None else INT4
        n, k = len(weight), weight.shape[1] * (2 if format_ == INT4 else 1)
        assert not n % TILE, n
        assert not k % CHUNK, k
        sums = None
        if format_ == INT8 and not embedding:
            sums = torch.empty(n, dtype=torch.int32)
            call("sum_rows", _at(weight), n, k, _at(sums))
        wide = None if bias is None else bias.detach().float()
        groups = (scale, minimum) if format_ == INT4 else (None, None)
        self._kept = [weight, scale if format_ == INT8 else None, sums, *groups, wide]
        self.matrix = Matrix(
            format_, n, k, *(None if t is None else t.contiguous().data_ptr() for t in self._kept)
        )
