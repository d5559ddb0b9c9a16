"""Sliding windows, which published configurations carry switched off."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.model import attention
from qwen2.model.attention import windowed_attention
from qwen2.model.cache import KVStore
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hf_config import config_from_hf, config_to_hf

CPU = torch.device("cpu")


def build(tiny: ModelConfig, **changes: Any) -> tuple[Qwen2, dict[str, Any]]:
    values = {**config_to_hf(tiny, "float32"), **changes}
    model = Qwen2(config_from_hf(values)).eval()
    init_weights(model, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model, values


WINDOWS: dict[str, dict[str, Any]] = {
    "all layers": {"max_window_layers": 0},
    "the last": {"max_window_layers": 2},
    "none": {"max_window_layers": 3},
    "named": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("size", [1, 7, 200])
@torch.no_grad()
def test_logits_equal_transformers(tiny: ModelConfig, window: str, size: int) -> None:
    changes = {"use_sliding_window": True, "sliding_window": size, **WINDOWS[window]}
    model, values = build(tiny, **changes)
    config = transformers.Qwen2Config(**values, attn_implementation="eager")
    other = transformers.Qwen2ForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 300, (61,), generator=torch.Generator().manual_seed(1))
    ours = model(tokens, torch.arange(61), model.packed([61]))
    torch.testing.assert_close(ours, other(tokens[None]).logits[0], atol=1e-5, rtol=1e-5)
    plain, _ = build(tiny)
    changed = not torch.allclose(ours, plain(tokens, torch.arange(61), plain.packed([61])))
    assert changed == (window != "none" and size < 61)


@torch.no_grad()
def test_written_configurations_are_read_alike_by_transformers(tiny: ModelConfig) -> None:
    model, _ = build(tiny, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    theirs = transformers.Qwen2Config(**config_to_hf(model.config, "float32"))
    assert theirs.sliding_window == 5
    assert theirs.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]


@given(
    T=st.integers(1, 40), past=st.integers(0, 40), window=st.integers(1, 30), G=st.integers(1, 3)
)
@settings(max_examples=60)
def test_equals_a_dense_mask(T: int, past: int, window: int, G: int) -> None:
    generator = torch.Generator().manual_seed(0)
    S, D = T + past, 6
    q = torch.randn(T, 2 * G, D, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, S, 2, D, generator=generator, dtype=torch.float64)
    scores = torch.einsum("tkgd,skd->kgts", q.view(T, 2, G, D), k) / D**0.5
    distance = torch.arange(past, S)[:, None] - torch.arange(S)
    scores = scores.masked_fill((distance < 0) | (distance >= window), -torch.inf)
    expected = torch.einsum("kgts,skd->tkgd", scores.softmax(-1), v).reshape(T, 2 * G, D)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(attention, "WINDOW_ROWS", 8)
        out = windowed_attention(q, k, v, window)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=1e-12)


@torch.no_grad()
def test_cache_equals_no_cache(tiny: ModelConfig) -> None:
    model, _ = build(tiny, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    tokens = torch.randint(0, 300, (40,), generator=torch.Generator().manual_seed(1))
    store = KVStore(model.config, 40, torch.float32, CPU)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    parts, end = [], 0
    for chunk in tokens.split([13, 20, 1, 1, 5]):
        end += len(chunk)
        context = model.cached(store, [slots[:end]], [len(chunk)])
        parts.append(model(chunk, context.positions(CPU), context))
    whole = model(tokens, torch.arange(40), model.packed([40]))
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


def test_gradients_stay_inside_the_window() -> None:
    q, k, v = (torch.randn(30, 2, 4, requires_grad=True) for _ in "qkv")
    windowed_attention(q, k, v, 4)[20].sum().backward()
    assert v.grad is not None
    seen = v.grad.abs().sum((1, 2)) > 0
    assert seen.nonzero().flatten().tolist() == [17, 18, 19, 20]
