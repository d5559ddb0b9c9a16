"""The store of keys and values in int8, under a bias as large as the real models have."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from qwen2.model import native
from qwen2.model.cache import KVStore
from qwen2.model.config import DualChunk, ModelConfig
from qwen2.model.decode_step import DecodeStep, can_step
from qwen2.model.decoder import Qwen2

CPU = torch.device("cpu")
IDS = [i * 7 % 300 for i in range(90)]
TABLE = torch.tensor(
    [s for block in (5, 0, 7, 2, 3, 9) for s in range(16 * block, 16 * block + 16)]
)


def build(
    random_model: Callable[..., Qwen2], dtype: torch.dtype, dual_chunk: DualChunk | None = None
) -> Qwen2:
    """Keys with a bias of norm 393, as at layer 0 of the 0.5B, and queries with one that is not."""
    config = ModelConfig(
        vocab_size=320, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        dual_chunk=dual_chunk,
    )  # fmt: skip
    model = random_model(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.model.embed_tokens.weight.sub_(0.1)  # else all logits are much the same
        for layer in model.model.layers:
            bias = torch.randn(layer.self_attn.k_proj.bias.shape, generator=generator)
            bias[bias.abs() < 1.5] = 0  # in few units, as there
            layer.self_attn.k_proj.bias.copy_(393 * bias / bias.norm())
            layer.self_attn.v_proj.weight.mul_(3)
    return model.to(dtype)


@torch.inference_mode()
def logits(model: Qwen2, store: KVStore, pieces: tuple[int, ...]) -> torch.Tensor:
    """Of all tokens, passed through in pieces, by the module's own pass."""
    out, done = [], 0
    for count in pieces:
        context = model.cached(store, [TABLE[: done + count]], [count])
        tokens = torch.tensor(IDS[done : done + count])
        out.append(model(tokens, context.positions(CPU), context))
        done += count
    return torch.cat(out).float()


def error(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Of the logits, as a share of how they differ from token to token."""
    return float((other - exact).norm() / (exact - exact.mean(0)).norm())


@pytest.mark.parametrize("dual_chunk", [None, DualChunk(chunk_size=32, local_size=8)])
def test_int8_keys_survive_their_bias(
    random_model: Callable[..., Qwen2], dual_chunk: DualChunk | None
) -> None:
    model = build(random_model, torch.float32, dual_chunk)
    arguments = (model.config, 160, torch.float32, CPU)
    exact = logits(model, KVStore(*arguments), (90,))
    quantised = logits(model, KVStore(*arguments, model.key_biases()), (90,))
    # Were the bias quantised with the rest, as if there were none to take off:
    naive = logits(model, KVStore(*arguments, [0 * b for b in model.key_biases()]), (90,))
    assert error(exact, quantised) < 0.03
    assert error(exact, naive) > 8 * error(exact, quantised)


def test_int8_in_pieces_is_int8_at_once(random_model: Callable[..., Qwen2]) -> None:
    model = build(random_model, torch.float32)
    arguments = (model.config, 160, torch.float32, CPU, model.key_biases())
    once = logits(model, KVStore(*arguments), (90,))
    pieces = logits(model, KVStore(*arguments), (50, 1, 1, 38))
    torch.testing.assert_close(pieces, once, rtol=1e-3, atol=1e-3)


def test_the_native_kernels_read_the_same_store(random_model: Callable[..., Qwen2]) -> None:
    model = build(random_model, torch.bfloat16)
    if reason := can_step(model.config, torch.bfloat16, CPU):
        pytest.skip(f"native step: {reason}")
    stores = [
        KVStore(model.config, 160, torch.bfloat16, CPU, b) for b in (model.key_biases(), None)
    ]
    out = []
    for store in stores:
        module = logits(model, store, (80, *[1] * 10))[80:]
        step = DecodeStep(model, store, 16)
        rows = [step([IDS[i]], [i], [1], [[5, 0, 7, 2, 3, 9]], [0]) for i in range(80, 90)]
        out.append(error(module, torch.cat(rows)))
    assert max(out) < 0.02
    assert out[0] < 2 * out[1]  # as near in int8 as it is in bf16


@pytest.mark.parametrize("new", [1, 30])
def test_native_attention_reads_int8(random_model: Callable[..., Qwen2], new: int) -> None:
    if not native.is_fast():
        pytest.skip(f"native attention: {native.why_not()}")
    model = build(random_model, torch.bfloat16)
    store = KVStore(model.config, 160, torch.bfloat16, CPU, model.key_biases())
    logits(model, store, (90,))
    angles = model.model.rope.table(torch.arange(90), torch.float32)
    kept = store.layer(1, angles)
    q = torch.randn(new, 4, 32, generator=torch.Generator().manual_seed(0)).bfloat16() / 20
    keys, values = kept.read(TABLE[:90], torch.bfloat16)
    scores = torch.einsum("nkgd,skd->nkgs", q.float().view(new, 2, 2, 32), keys.float())
    late = torch.arange(90) > torch.arange(90 - new, 90)[:, None]
    weights = (scores / math.sqrt(32)).masked_fill(late[:, None, None], -torch.inf).softmax(-1)
    expected = torch.einsum("nkgs,skd->nkgd", weights, values.float()).flatten(1, 2)
    ours = native.attention(q, kept, TABLE[:90]).float()
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)


def test_int8_takes_half_the_memory(random_model: Callable[..., Qwen2]) -> None:
    model = build(random_model, torch.bfloat16)

    def size(store: KVStore) -> int:
        tensors = [*store.keys, *store.values]
        if store.key_bias is not None:
            tensors += [*store.key_scales, *store.value_scales]
        return sum(t.nbytes for t in tensors)

    plain = KVStore(model.config, 160, torch.bfloat16, CPU)
    quantised = KVStore(model.config, 160, torch.bfloat16, CPU, model.key_biases())
    assert size(quantised) / size(plain) == (32 + 4) / 64  # of a head: 32 bytes and a scale
