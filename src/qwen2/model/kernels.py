"""Which kernel does what: one table, made by measuring, see `tune` and `qwen2 doctor`.

Every choice between kernels that do the same is made here, for every device; who computes asks the
table. Which is the fastest depends on the machine, so each is measured once on operands of a usual
size, and what came out is kept in a file of the user's cache. Before that, and for whoever does
not ask, the first that takes the operands is used; where no other does, the plain one in PyTorch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2.common.files import durable_write
from qwen2.model import native
from qwen2.model.operation import Kernel, Operation

if TYPE_CHECKING:
    from qwen2.model.cache import KVStore, LayerKV
    from qwen2.model.decoder import Qwen2

CPU = torch.device("cpu")
BLOCK = 512  # rows
NATIVE_STEP = "native, in one call"


def _later(module: str, name: str) -> Callable[..., Any]:
    """A function of a module that itself asks the table, and so is imported after it."""

    @cache
    def found() -> Any:
        return getattr(import_module(f"qwen2.model.{module}"), name)

    def call(*operands: Any) -> Any:
        return found()(*operands)

    return call


# -------------------------------------------------------------------- when a kernel can be used


def _native(x: Tensor, *_: Any) -> bool:
    """In bf16, without gradients, where the native kernels are fast."""
    return x.dtype == torch.bfloat16 and not torch.is_grad_enabled() and native.is_fast()


def _native_rotation(x: Tensor, cos: Tensor, _: Tensor) -> bool:
    return _native(x) and cos.dtype == x.dtype and x.shape[-1] <= native.MOST_D


def _native_attention(q: Tensor, kept: LayerKV, _: Tensor | slice) -> bool:
    return not torch.is_grad_enabled() and native.can_attend(q, kept)


def _native_step(model: Qwen2, _: KVStore) -> bool:
    from qwen2.model.decode_step import can_step

    return can_step(model.config, model.dtype, model.device) is None


def _without_gradients(*_: Any) -> bool:
    return not torch.is_grad_enabled()


def _onednn(x: Tensor, *_: Any) -> bool:
    return x.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _no_bf16(x: Tensor, *_: Any) -> bool:
    """On processors whose products in bf16 are loops over single numbers."""
    slow = x.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return slow and not torch.is_grad_enabled()


def _no_int8(*_: Any) -> bool:
    """On processors without instructions for products of integers."""
    return not torch.cpu._is_vnni_supported()


def _int4pack(_: Tensor, weight: Tensor, *__: Any) -> bool:
    return bool(_later("int4pack", "fits_torch")(len(weight)))


def _half(q: Tensor, *_: Any) -> bool:
    return q.dtype in (torch.bfloat16, torch.float16)


def _varlen(q: Tensor, *_: Any) -> bool:
    """What the flash kernel takes, from Ampere on; not fp16, see attend."""
    able = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return able and q.dtype == torch.bfloat16 and q.shape[-1] <= 256 and not q.shape[-1] % 8


def _sixteen_bytes(left: Tensor, right: Tensor, _: Tensor) -> bool:
    """bf16 in rows of a multiple of 16 bytes."""
    sizes = (*left.shape[1:], *right.shape[1:])
    return left.dtype == right.dtype == torch.bfloat16 and not any(size % 8 for size in sizes)


# ---------------------------------------------------------------------------------- the kernels


def _matrix_vector(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None:
        return torch.mv(weight, x[0])[None]
    return torch.addmv(bias, weight, x[0])[None]


def _pack_for_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    return x, torch.ops.mkldnn._reorder_linear_weight(weight, len(x)), bias


def _packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _linear_by_fp32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = None if bias is None else bias.float()
    return F.linear(x.float(), weight.float(), wide).to(x.dtype)


def _native_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """PyTorch's integer product between our ways in and out of it.

    Blocks of rows, so that their sums are read again while they are in the processor's cache.
    """
    rows, row_scale = native.quantise(x.contiguous())
    wide = None if bias is None else bias.float()
    out = torch.empty((len(x), len(weight)), dtype=torch.bfloat16)
    sums = torch.empty((min(len(x), BLOCK), len(weight)), dtype=torch.int32)
    for first in range(0, len(x), BLOCK):
        block = slice(first, first + BLOCK)
        some = sums[: len(x) - first]
        torch._int_mm(rows[block], weight.t(), out=some)
        native.scale_products(some, row_scale[block], scale, wide, out[block])
    return out


def _native_int4(
    x: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None
) -> Tensor:
    """A product in bf16, of activations as they are: many rows pay for dequantising."""
    return F.linear(x, native.dequantise_int4(weight, scale, minimum), bias)


def _pack_int4(
    x: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None
) -> tuple[Any, ...]:
    pack = _later("int4pack", "pack_int4_for_torch")
    return (x, *pack(weight, scale, minimum, x.dtype), bias)


def _swiglu(gate_up: Tensor) -> Tensor:
    """gate_up (N, 2 I), which is written over -> silu(gate) * up (N, I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)  # fresh memory costs a tenth of it


def _gate(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two (N, I), which stay as they are."""
    return F.silu(gate) * up


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads of x (N, H, D) by cos and sin (N, 1, D/2); see rope.py."""
    first, second = x.chunk(2, dim=-1)  # (N, H, D/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def _gathered_attention(q: Tensor, kept: LayerKV, place: Tensor | slice) -> Tensor:
    return _causal_attention(q, *kept.read(place, q.dtype))


_causal_attention = _later("attention", "causal_attention")


def _grouped_mm(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    return F.grouped_mm(rows, matrices, offs=counts.cumsum(0, dtype=torch.int32))


def _grouped_outer(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    return F.grouped_mm(left.t(), right, offs=counts.cumsum(0, dtype=torch.int32))


def _prepare_step(model: Qwen2, store: KVStore) -> tuple[Any, ...]:
    return (_later("decode_step", "DecodeStep")(model, store, BLOCK_SIZE),)


def _step(step: Callable[..., Tensor]) -> Tensor:
    return step([1], [LENGTH - 1], [1], [range(-(-LENGTH // BLOCK_SIZE))], [0])


def _module_step(model: Qwen2, store: KVStore) -> Tensor:
    attention = model.cached(store, [torch.arange(LENGTH)], [1])
    token, position = torch.tensor([[1], [LENGTH - 1]], device=model.device)
    return model(token, position, attention).float().cpu()


# -------------------------------------------------- operands to measure with: widths of the 0.5B

N, K, H, KV, D = 4864, 896, 14, 2, 64
ROWS, EXPERTS, WIDTH = 512, 8, 1280
LENGTH, BLOCK_SIZE = 64, 16  # of the sequence of the step


def _bf16(device: torch.device, *shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bfloat16, device=device)


def _int8_operands(device: torch.device) -> tuple[Any, ...]:
    weight = torch.ones((N, K), dtype=torch.int8, device=device)
    return _bf16(device, ROWS, K), weight, torch.ones(N, device=device), None


def _int4_operands(device: torch.device) -> tuple[Any, ...]:
    weight = torch.ones((N, K // 2), dtype=torch.uint8, device=device)
    scales = torch.ones((2, N, K // 32), dtype=torch.float16, device=device)
    return _bf16(device, ROWS, K), weight, *scales, None


def _attention_operands(device: torch.device) -> tuple[Any, ...]:
    from qwen2.model.cache import LayerKV

    kept = LayerKV(_bf16(device, ROWS, KV, D), _bf16(device, ROWS, KV, D))
    return _bf16(device, ROWS, H, D), kept, torch.arange(ROWS, device=device)


def _packed_operands(device: torch.device) -> tuple[Any, ...]:
    from qwen2.model.attend import Documents

    keys = (_bf16(device, ROWS, KV, D) for _ in range(2))
    return _bf16(device, ROWS, H, D), *keys, Documents([ROWS // 8, ROWS // 2, 3 * ROWS // 8])


def _parts_operands(device: torch.device) -> tuple[Any, ...]:
    q = _bf16(device, KV, H // KV, ROWS // 2, D)
    keys = [_bf16(device, KV, 1, ROWS // 2, D).expand(-1, H // KV, -1, -1) for _ in range(4)]
    return q, *keys[:2], q, *keys[2:], (False, True)


def _expert_operands(device: torch.device) -> tuple[Any, ...]:
    counts = torch.full((EXPERTS,), ROWS // EXPERTS, device=device)
    return _bf16(device, ROWS, K), _bf16(device, EXPERTS, K, WIDTH), counts


def _outer_operands(device: torch.device) -> tuple[Any, ...]:
    return _bf16(device, ROWS, K), _bf16(device, ROWS, WIDTH), _expert_operands(device)[2]


def _step_operands(device: torch.device) -> tuple[Any, ...]:
    """Two layers, and a head as large as one: what matters is how their parts are called."""
    from qwen2.model.cache import KVStore
    from qwen2.model.config import ModelConfig
    from qwen2.model.decoder import Qwen2
    from qwen2.model.weights import WithoutInit

    config = ModelConfig(
        vocab_size=N, hidden_size=K, intermediate_size=N, num_hidden_layers=2,
        num_attention_heads=H, num_key_value_heads=KV, max_position_embeddings=LENGTH,
    )  # fmt: skip
    with device, WithoutInit():
        model = Qwen2(config).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    model.fuse_projections()
    store = KVStore(config, LENGTH, torch.bfloat16, device)
    for kept in (*store.keys, *store.values):
        kept.zero_()
    return model, store


TWICE = "not used: it needs a second copy of every weight, as decoding reads the stored one"
FRESH = "not used: a loop into fresh memory, up to 6 times slower in training"

TABLE = {
    "step": Operation(
        "the pass of a dense model over a few tokens",
        ("modules, operation by operation", Kernel(_module_step)),
        {"cpu": {NATIVE_STEP: Kernel(_step, _native_step, _prepare_step)}},
        _step_operands,
    ),
    "bf16 row": Operation(
        "product of one row with a bf16 weight",
        ("linear", Kernel(F.linear)),
        {"cpu": {"mv": Kernel(_matrix_vector, _without_gradients)}},
        lambda device: (_bf16(device, 1, K), _bf16(device, N, K), None),
    ),
    "bf16 rows": Operation(
        "product of many rows with a bf16 weight",
        ("linear", Kernel(F.linear)),
        {
            "cpu": {
                "fp32": Kernel(_linear_by_fp32, _no_bf16),
                "oneDNN, packed": Kernel(_packed_linear, _onednn, _pack_for_onednn, TWICE),
            }
        },
        lambda device: (_bf16(device, ROWS, K), _bf16(device, N, K), None),
    ),
    "int8 rows": Operation(
        "product of many rows with an int8 weight",
        ("_int_mm, PyTorch around it", Kernel(_later("quantised_linear", "int8_linear"))),
        {
            "cpu": {
                "_int_mm, native around it": Kernel(_native_int8, _native),
                "fp32, exact": Kernel(_later("quantised_linear", "int8_linear_by_fp32"), _no_int8),
            }
        },
        _int8_operands,
    ),
    "int4 rows": Operation(
        "product of many rows with an int4 weight",
        ("PyTorch, fp32", Kernel(_later("quantised_linear", "int4_linear"))),
        {
            "cpu": {
                "native dequantised, bf16": Kernel(_native_int4, _native),
                "int4pack": Kernel(
                    _later("int4pack", "int4_linear_by_torch"), _int4pack, _pack_int4, TWICE
                ),
            }
        },
        _int4_operands,
    ),
    "norm": Operation(
        "RMS norm of many rows",
        ("PyTorch", Kernel(_norm)),
        {"cpu": {"native": Kernel(native.rms_norm, _native)}},
        lambda device: (_bf16(device, ROWS, K), _bf16(device, K), 1e-6),
    ),
    "rotate": Operation(
        "rotation of the heads of many tokens",
        ("PyTorch", Kernel(_rotate)),
        {"cpu": {"native": Kernel(native.rotate, _native_rotation)}},
        lambda device: (_bf16(device, ROWS, H, D), *_bf16(device, 2, ROWS, 1, D // 2)),
    ),
    "swiglu": Operation(
        "silu(gate) * up",
        ("PyTorch", Kernel(_swiglu)),
        {"cpu": {"native": Kernel(native.swiglu, _native)}},
        lambda device: (_bf16(device, ROWS, 2 * N),),
    ),
    "gate": Operation(
        "silu(gate) * up in training",
        ("PyTorch", Kernel(_gate)),
        {},
        lambda device: tuple(_bf16(device, 2, ROWS, N)),
    ),
    "attention": Operation(
        "causal attention of many tokens over paged keys",
        ("gather and SDPA", Kernel(_gathered_attention)),
        {"cpu": {"native": Kernel(native.attention, _native_attention)}},
        _attention_operands,
    ),
    "packed attention": Operation(
        "causal attention within documents laid end to end",
        ("SDPA, document by document", Kernel(_later("attend", "each_document"))),
        {"cuda": {"varlen": Kernel(_later("attend", "all_documents"), _varlen)}},
        _packed_operands,
    ),
    "merged attention": Operation(
        "attention over several sets of keys, merged by log-sum-exp",
        ("PyTorch, blocks of scores", Kernel(_later("attend", "plain_parts"))),
        {
            "cpu": {"flash": Kernel(_later("attend", "flash_parts"))},
            "cuda": {"flash": Kernel(_later("attend", "flash_parts"), _half)},
        },
        _parts_operands,
    ),
    "expert products": Operation(
        "products of rows, sorted by expert, with the experts' weights",
        ("mm, a thread each", Kernel(_later("experts", "threaded_products"))),
        {
            "cpu": {"grouped_mm": Kernel(_grouped_mm, _sixteen_bytes, never=FRESH)},
            "cuda": {"grouped_mm": Kernel(_grouped_mm, _sixteen_bytes)},
        },
        _expert_operands,
    ),
    "expert gradients": Operation(
        "gradients of the experts' weights",
        ("mm, a thread each", Kernel(_later("experts", "threaded_outer_products"))),
        {
            "cpu": {"grouped_mm": Kernel(_grouped_outer, _sixteen_bytes, never=FRESH)},
            "cuda": {"grouped_mm": Kernel(_grouped_outer, _sixteen_bytes)},
        },
        _outer_operands,
    ),
}


# ------------------------------------------------------------------------------------ measuring


def tune(device: torch.device = CPU, again: bool = False) -> None:
    """Prefer the fastest kernels on a device: from the cache, or by measuring (`again`)."""
    path, key = _cache_file(), _key(device)
    known = {} if again else _read(path).get(key, {})
    kind = device.type
    if any(set(known.get(name, ())) != set(op.kernels[kind]) for name, op in TABLE.items()):
        with torch.inference_mode():
            known = {name: operation.measure(device) for name, operation in TABLE.items()}
        _write(path, key, known)
    for name, operation in TABLE.items():
        operation.learn(kind, known[name])


def _key(device: torch.device) -> str:
    """What the measurements hold for."""
    from qwen2.common.hardware import processor

    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    kinds = "native" if native.is_fast() else native.why_not() or "plain loops"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}, {kinds}"


def _cache_file() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "qwen2" / "kernels.json"


def _read(path: Path) -> dict[str, dict[str, dict[str, float | None]]]:
    try:
        known = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _write(path: Path, key: str, known: dict[str, dict[str, float | None]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        durable_write(path, json.dumps({**_read(path), key: known}, indent=1).encode())
    except OSError:
        pass  # a cache that cannot be kept is measured again
