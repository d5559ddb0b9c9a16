"""Model shapes: the five sizes of Table 1 and any miniature (report section 2.2).

Field names are those of the published `config.json`, which hf_config.py reads and writes. Counts
are closed forms, held against the table and against the built module by tests.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from qwen2.common.config import Config

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}

PRETRAINED_LENGTH = 32_768
"""Tokens of the longest context that the published models were trained on (report section 3.2),
whatever their `max_position_embeddings` says: 131,072 in the base checkpoints."""


class Yarn(Config):
    """Static YARN (Peng et al. 2023; report section 2.2.1): see `rope.yarn_frequencies`."""

    factor: float = Field(ge=1)  # s, by which the context grows
    original_max_position_embeddings: int = Field(gt=0)  # L0, of training
    beta_fast: float = Field(default=32.0, gt=0)  # turns within L0 from which a unit stays as it is
    beta_slow: float = Field(default=1.0, gt=0)  # turns up to which it is slowed by the factor
    attention_factor: float | None = Field(default=None, gt=0)  # None: 0.1 ln s + 1
    truncate: bool = True  # round the bounds of the ramp outwards to whole units


class DualChunk(Config):
    """Dual Chunk Attention (An et al. 2024; report section 2.2.1): see dual_chunk.py."""

    chunk_size: int = Field(gt=1)  # C: no relative position is larger
    local_size: int = Field(gt=0)  # w: distances below it are exact across the start of a chunk
    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    """L0, beyond which YARN's temperature sharpens attention; None: it never does."""

    @model_validator(mode="after")
    def _a_stride_remains(self) -> Self:
        if self.local_size >= self.chunk_size:
            raise ValueError("local_size must be smaller than chunk_size")
        return self

    @property
    def stride(self) -> int:
        """L = C - w, tokens of a chunk."""
        return self.chunk_size - self.local_size


class SlidingWindow(Config):
    """Layers whose tokens see only the last `size` tokens, themselves included."""

    size: int = Field(gt=0)
    layers: tuple[int, ...]


class Mixture(Config):
    """Routed and shared experts in place of the MLP (report section 2.2.2): see moe.py."""

    num_experts: int = Field(gt=0)
    num_experts_per_tok: int = Field(gt=0)
    moe_intermediate_size: int = Field(gt=0)  # of each routed expert
    shared_expert_intermediate_size: int = Field(ge=0)  # of all shared experts together
    norm_topk_prob: bool = False
    router_aux_loss_coef: float = Field(default=0.001, ge=0)

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError("num_experts_per_tok exceeds num_experts")
        return self


class Quantisation(Config):
    """Weights in few bits, for inference: see quantised_linear.py."""

    method: Literal["int8", "int4"]


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
    moe: Mixture | None = None  # None: dense, with an MLP of intermediate_size
    yarn: Yarn | None = None
    dual_chunk: DualChunk | None = None
    sliding: SlidingWindow | None = None
    quantisation: Quantisation | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError("hidden_size must be a multiple of num_attention_heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError("num_attention_heads must be a multiple of num_key_value_heads")
        if self.head_dim % 2:
            raise ValueError("hidden_size / num_attention_heads must be even: rotations pair units")
        return self

    @model_validator(mode="after")
    def _one_way_to_extend(self) -> Self:
        if self.dual_chunk and self.yarn:
            raise ValueError(
                "dual_chunk brings YARN's temperature along and leaves the frequencies as they "
                "are; give it or yarn, not both"
            )
        if self.dual_chunk and self.sliding:
            raise ValueError("dual_chunk and sliding windows exclude each other")
        if self.sliding and not all(0 <= i < self.num_hidden_layers for i in self.sliding.layers):
            raise ValueError("sliding.layers names layers beyond num_hidden_layers")
        return self

    @property
    def head_dim(self) -> int:
        """D, the width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """K·D, the width of all keys of one token."""
        return self.num_key_value_heads * self.head_dim

    @property
    def trained_length(self) -> int:
        """L0, tokens of the longest context that the weights were trained on."""
        if self.yarn:
            return self.yarn.original_max_position_embeddings
        if self.dual_chunk and self.dual_chunk.original_max_position_embeddings:
            return self.dual_chunk.original_max_position_embeddings
        return min(self.max_position_embeddings, PRETRAINED_LENGTH)

    @property
    def context_length(self) -> int:
        """Tokens of the longest context that may be used."""
        if self.yarn:
            extended = int(self.yarn.factor * self.yarn.original_max_position_embeddings)
            return max(self.max_position_embeddings, extended)
        return self.max_position_embeddings

    def window(self, layer: int) -> int | None:
        """Tokens that a token of `layer` sees, itself included; None: all before it."""
        return self.sliding.size if self.sliding and layer in self.sliding.layers else None

    def num_parameters(self) -> int:
        """All parameters; a tied embedding counts once."""
        head = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.vocab_size * self.hidden_size + self.num_non_embedding_parameters() + head

    def num_non_embedding_parameters(self) -> int:
        """Parameters besides the input embedding and the output head."""
        C, KD = self.hidden_size, self.kv_size
        attention = 2 * C * C + C + 2 * (C * KD + KD)  # q, o; bias on q, k, v only
        norms = 2 * C
        return self.num_hidden_layers * (attention + self._feed_forward() + norms) + C

    def num_active_parameters(self) -> int:
        """Parameters that one token passes through: all but those of experts it is not sent to."""
        return self.num_parameters() - self._num_idle_parameters()

    def _feed_forward(self) -> int:
        """Parameters of a layer's MLP, or of its router, experts and shared gate."""
        C, moe = self.hidden_size, self.moe
        if moe is None:
            return 3 * C * self.intermediate_size
        routed = moe.num_experts * (C + 3 * C * moe.moe_intermediate_size)
        width = moe.shared_expert_intermediate_size
        return routed + (3 * C * width + C if width else 0)

    def _num_idle_parameters(self) -> int:
        if self.moe is None:
            return 0
        idle = self.moe.num_experts - self.moe.num_experts_per_tok
        return self.num_hidden_layers * idle * 3 * self.hidden_size * self.moe.moe_intermediate_size

    def kv_bytes_per_token(self, dtype: str = "bf16") -> int:
        """Bytes of keys and values that one token leaves in the cache of all layers."""
        return 2 * self.num_hidden_layers * self.kv_size * BYTES[dtype]

    def flops_per_token(self, context: int) -> float:
        """Training FLOPs for one token at `context` tokens, forward and backward, causal attention.

        6 per active parameter that multiplies (the embedding lookup does not), plus 12·C per
        visible key and layer, of which a causal token sees half the context (PaLM, appendix B).
        """
        active = self.num_non_embedding_parameters() - self._num_idle_parameters()
        matmul = active + self.vocab_size * self.hidden_size
        return 6 * matmul + 6 * self.num_hidden_layers * self.hidden_size * context


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
    "57b-a14b": _published(
        vocab_size=151936, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
        num_attention_heads=28, num_key_value_heads=4,
        moe=Mixture(
            num_experts=64, num_experts_per_tok=8, moe_intermediate_size=2560,
            shared_expert_intermediate_size=8 * 2560,
        ),
    ),
    "72b": _published(
        vocab_size=152064, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, rms_norm_eps=1e-5,
    ),
}  # fmt: skip
"""The models of Table 1, as their base checkpoints are configured."""
