"""Model shapes: the dense sizes of Table 1 and any miniature (report section 2.2.1).

Field names are those of the published `config.json`. Counts are closed forms, held against the
table and against the built module by tests.
"""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from qwen2.common.config import Config
from qwen2.common.errors import UserError

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}


class ModelConfig(Config):
    """Everything that decides the shape and the arithmetic of a decoder."""

    vocab_size: int = Field(gt=0)  # rows of the embedding; may exceed the tokenizer's ids
    hidden_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    tie_word_embeddings: bool = False
    rope_theta: float = Field(default=1_000_000.0, gt=0)
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    max_position_embeddings: int = Field(default=131_072, gt=0)
    initializer_range: float = Field(default=0.02, gt=0)
    eos_token_id: int | list[int] | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError("hidden_size / num_attention_heads must be even: rotations pair units")
        return self

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """K·D, the width of all keys of one token."""
        return self.num_key_value_heads * self.head_dim

    def num_parameters(self) -> int:
        """All parameters; a tied embedding counts once."""
        head = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.vocab_size * self.hidden_size + self.num_non_embedding_parameters() + head

    def num_non_embedding_parameters(self) -> int:
        """Parameters besides the input embedding and the output head."""
        C, I, KD = self.hidden_size, self.intermediate_size, self.kv_size  # noqa: E741
        attention = 2 * C * C + C + 2 * (C * KD + KD)  # q, o; bias on q, k, v only
        mlp = 3 * C * I
        norms = 2 * C
        return self.num_hidden_layers * (attention + mlp + norms) + C

    def num_active_parameters(self) -> int:
        """Parameters that one token passes through: all of them in a dense model."""
        return self.num_parameters()

    def kv_bytes_per_token(self, dtype: str = "bf16") -> int:
        """Bytes of keys and values that one token leaves in the cache of all layers."""
        return 2 * self.num_hidden_layers * self.kv_size * BYTES[dtype]

    def flops_per_token(self, context: int) -> float:
        """Training FLOPs for one token at `context` tokens, forward and backward, causal attention.

        6 per parameter that multiplies (the embedding lookup does not), plus 12·C per visible key
        and layer, of which a causal token sees half the context (PaLM, appendix B).
        """
        matmul = self.num_non_embedding_parameters() + self.vocab_size * self.hidden_size
        return 6 * matmul + 6 * self.num_hidden_layers * self.hidden_size * context

    @classmethod
    def from_hf(cls, values: dict[str, Any], where: str = "config.json") -> Self:
        """Read a published `config.json`; what this code cannot honour is refused, not ignored."""
        values = dict(values)
        if values.get("model_type") != "qwen2":
            raise UserError(f"{where}: model_type {values.get('model_type')!r}, expected 'qwen2'")
        if values.get("hidden_act", "silu") != "silu":
            raise UserError(f"{where}: hidden_act {values['hidden_act']!r}, expected 'silu'")
        # transformers 5 moved the base of the rotations into `rope_parameters`.
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise UserError(f"{where}: rope_scaling {rope!r}, expected keys and values")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise UserError(f"{where}: rope scaling {kind!r} is not supported; remove rope_scaling")
        if values.get("use_sliding_window"):
            raise UserError(f"{where}: use_sliding_window is not supported; set it to false")
        if "rope_theta" in rope:
            values["rope_theta"] = rope["rope_theta"]
        known = {key: values[key] for key in cls.model_fields if key in values}
        config = cls.parse(known, where)
        if values.get("head_dim") not in (None, config.head_dim):
            raise UserError(
                f"{where}: head_dim {values['head_dim']}, but hidden_size / num_attention_heads "
                f"is {config.head_dim}"
            )
        return config

    def to_hf(self, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers, vLLM and llama.cpp's converter read."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "torch_dtype": dtype,
            "use_cache": True,
            **self.model_dump(),
        }


def _published(**shape: Any) -> ModelConfig:
    return ModelConfig(eos_token_id=151643, **shape)


PUBLISHED: dict[str, ModelConfig] = {
    "0.5b": _published(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24,
        num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "1.5b": _published(
        vocab_size=151936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
        num_attention_heads=12, num_key_value_heads=2, tie_word_embeddings=True,
    ),
    "7b": _published(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4,
    ),
    "72b": _published(
        vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, rms_norm_eps=1e-5,
    ),
}  # fmt: skip
"""The dense models of Table 1, as their base checkpoints are configured."""
