"""A small random model of bytes, and where it lies as a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hub import save
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.chatml import default_source

SHAPE: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture(scope="session")
def coder() -> Tokenizer:
    return Tokenizer.from_ranks(
        {bytes([value]): value for value in range(256)},
        {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
        chat_template=default_source(),
    )


@pytest.fixture(scope="session")
def model() -> Qwen2:
    """Random, with weights large enough that tokens matter."""
    generator = torch.Generator().manual_seed(0)
    model = Qwen2(ModelConfig(**SHAPE)).eval()
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture(scope="session")
def checkpoint(model: Qwen2, coder: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save(model, coder, folder)
    return folder
