"""Rotations: YARN's frequencies and attention scale by hand and against transformers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen2.model.config import ModelConfig, Yarn
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hf_config import config_from_hf, config_to_hf
from qwen2.model.rope import Rope, yarn_attention_factor, yarn_frequencies

CPU = torch.device("cpu")


def ramp_bounds(d: int) -> tuple[int, int]:
    """The first unit that is slowed at all, less one, and the first that is slowed fully."""
    plain = torch.ones(d // 2)
    yarn = Yarn(factor=4, original_max_position_embeddings=32_768)
    slowed = yarn_frequencies(plain, 1e6, yarn)
    return int((slowed == 1).sum()) - 1, int((slowed > 0.25).sum())


def test_by_hand() -> None:
    """s = 4, L0 = 32,768, θ = 10⁶: the bounds of the ramp for head widths 128 and 64."""
    assert ramp_bounds(128) == (23, 40)
    assert ramp_bounds(64) == (11, 20)
    yarn = Yarn(factor=4, original_max_position_embeddings=32_768)
    assert yarn_attention_factor(yarn) == pytest.approx(1.1386294, abs=1e-7)
    plain = Rope(64, 1e6).frequencies(CPU, torch.float64)
    slowed = yarn_frequencies(plain, 1e6, yarn)
    ramp = (15 - 11) / (20 - 11)
    assert slowed[15].item() == pytest.approx(plain[15].item() * ((1 - ramp) + ramp / 4))
    cos, _ = Rope(64, 1e6, yarn).table(torch.tensor([7]), torch.float64)
    assert cos[0, 0, 15].item() == pytest.approx(1.1386294 * math.cos(7 * slowed[15]), abs=1e-7)


@given(
    factor=st.floats(1.0, 40.0),
    trained=st.sampled_from([16, 512, 4096, 32_768]),
    theta=st.sampled_from([10_000.0, 1e6]),
    head_dim=st.sampled_from([8, 64, 128]),
    attention_factor=st.none() | st.floats(0.5, 2.0),
    betas=st.sampled_from([(32.0, 1.0), (16.0, 2.0)]),
    truncate=st.booleans(),
)
@settings(max_examples=80)
def test_equals_transformers(
    factor: float, trained: int, theta: float, head_dim: int, attention_factor: float | None,
    betas: tuple[float, float], truncate: bool,
) -> None:  # fmt: skip
    yarn = Yarn(
        factor=factor, original_max_position_embeddings=trained, beta_fast=betas[0],
        beta_slow=betas[1], attention_factor=attention_factor, truncate=truncate,
    )  # fmt: skip
    theirs = transformers.Qwen2Config(
        hidden_size=head_dim * 2, num_attention_heads=2, max_position_embeddings=8 * trained,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": theta, **yarn.model_dump(exclude_none=True)
        },
    )  # fmt: skip
    expected, scale = ROPE_INIT_FUNCTIONS["yarn"](theirs, CPU)
    ours = Rope(head_dim, theta, yarn).frequencies(CPU)
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)
    assert yarn_attention_factor(yarn) == pytest.approx(scale, abs=1e-6)


@pytest.mark.parametrize("kind", ["type", "rope_type"])
@torch.no_grad()
def test_logits_with_static_yarn_equal_transformers(tiny: ModelConfig, kind: str) -> None:
    values: dict[str, Any] = config_to_hf(tiny, "float32")
    values["rope_scaling"] = {
        kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 16
    }  # fmt: skip
    model = Qwen2(config_from_hf(values)).eval()
    init_weights(model, torch.Generator().manual_seed(0))
    other = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**values)).eval()
    other.load_state_dict(model.state_dict())
    tokens = torch.randint(0, 300, (60,), generator=torch.Generator().manual_seed(1))
    ours = model(tokens, torch.arange(60), model.packed([60]))
    torch.testing.assert_close(ours, other(tokens[None]).logits[0], atol=1e-6, rtol=1e-5)


def test_a_factor_of_one_changes_nothing() -> None:
    yarn = Yarn(factor=1, original_max_position_embeddings=128)
    positions = torch.arange(300)
    for ours, plain in zip(
        Rope(64, 1e4, yarn).table(positions, torch.float32),
        Rope(64, 1e4).table(positions, torch.float32),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain, atol=1e-6, rtol=0)
