"""Fixtures that every folder's tests share."""

from __future__ import annotations

import os
from pathlib import Path

import qwen2  # noqa: F401  before torch: sets OMP_WAIT_POLICY, or a busy machine takes forever

# isort: split
import pytest
import torch
from hypothesis import settings

from qwen2.model.config import ModelConfig

# The same examples on every machine, however busy it is.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.load_profile("fixed")

REAL = "QWEN2_REAL_CHECKPOINT"


@pytest.fixture(scope="session")
def real_checkpoint() -> Path:
    """The real 0.5B checkpoint (a GGUF file), or a skip that says how to have it."""
    path = os.environ.get(REAL)
    if not path:
        pytest.skip(f"{REAL} is not set: it names Qwen2.5-Coder-0.5B-Instruct as a GGUF file")
    if not Path(path).is_file():
        pytest.skip(f"{REAL}={path}: no such file")
    return Path(path)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def tiny() -> ModelConfig:
    """A dense miniature with grouped queries."""
    return ModelConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
