"""A tiny model of bytes whose greedy answers are varied, and what one full pass makes of it."""

from __future__ import annotations

from typing import Any

import torch

from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.tokenizer import Tokenizer

BYTES = Tokenizer.from_ranks(
    {bytes([value]): value for value in range(256)},
    {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
)
SHAPE: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip


def build(**changes: Any) -> Qwen2:
    """A model whose every parameter is random, and large enough that tokens matter."""
    generator = torch.Generator().manual_seed(0)
    model = Qwen2(ModelConfig(**{**SHAPE, **changes})).eval()
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


@torch.inference_mode()
def full_pass_logits(model: Qwen2, ids: list[int]) -> torch.Tensor:
    """Logits (T, V) of one pass without a cache."""
    tokens = torch.tensor(ids)
    return model(tokens, torch.arange(len(ids)), model.packed([len(ids)]))


def full_pass_greedy(model: Qwen2, prompt: list[int], count: int) -> list[int]:
    """The greedy answer, by one pass without a cache for each token; no id ends it."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(int(full_pass_logits(model, ids)[-1, : BYTES.vocab_size].argmax()))
    return ids[len(prompt) :]
