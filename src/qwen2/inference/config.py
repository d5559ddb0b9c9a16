"""How much an engine computes and holds at a time, what it tells of itself, and how it fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

from pydantic import Field, model_validator

from qwen2.common.config import Config
from qwen2.common.runtime import free_memory
from qwen2.model.decoder import Qwen2
from qwen2.tokenizer import Tokenizer

TYPICAL = 2048  # tokens of a sequence, for whose number the default pool has room


class QueueFull(Exception):  # noqa: N818  (the name that servers agree on)
    """As many requests wait as may wait, or grammars: try again later."""


class EngineDead(RuntimeError):  # noqa: N818
    """The engine has failed and takes nothing any more."""


class EngineConfig(Config):
    """How much is computed and held at a time."""

    max_batch_tokens: int = Field(default=1024, ge=1)  # of one pass: bounds its activations
    max_running: int = Field(default=64, ge=1)
    block_size: int = Field(default=16, ge=1)
    kv_tokens: int | None = Field(default=None, ge=1)  # of all sequences; None: `default_kv_tokens`
    kv_dtype: Literal["auto", "int8"] = "auto"
    prefix_cache: bool = True
    max_queue: int = Field(default=256, ge=1)  # requests that may wait
    speculate: int = Field(default=0, ge=0, le=31)  # tokens to guess at a time; see speculate.py

    @model_validator(mode="after")
    def _everyone_gets_a_token(self) -> Self:
        if self.max_running > self.max_batch_tokens:
            raise ValueError("max_running exceeds max_batch_tokens: each takes one in every pass")
        return self


@dataclass(frozen=True)
class EngineStats:
    """What the engine does now, and sums of what it has done, in tokens where nothing is said."""

    running: int  # requests
    waiting: int  # requests
    kv_used: float  # share of the pool that sequences hold
    prefix_queries: int  # of prompts that were looked up
    prefix_hits: int  # of them, those that were there
    preemptions: int  # times
    prompt_tokens: int
    generated_tokens: int
    spec_proposed: int = 0  # guesses that the model has verified
    spec_accepted: int = 0  # of them, those that were what it drew


def default_kv_tokens(model: Qwen2, max_running: int) -> int:
    """Room for one sequence of the model's context, or for `max_running` of 2,048 tokens.

    The larger of the two; but the first within half of the memory that is free, and what the
    second wants beyond it within a quarter; at least one sequence of 2,048 tokens in any case. On
    the CPU none of it is taken before it is used.
    """
    config = model.config
    layers, row = config.num_hidden_layers, config.kv_size
    free = free_memory(model.device) // (2 * layers * row * model.dtype.itemsize)  # tokens
    context = config.context_length
    typical = min(TYPICAL, context)
    return max(typical, min(context, free // 2), min(max_running * typical, free // 4))


def stop_ids(model: Qwen2, tokenizer: Tokenizer) -> frozenset[int]:
    """Every id that ends an answer: the checkpoint's own and both ends that ChatML knows.

    A base model that was tuned to chat often still names only `<|endoftext|>`, and would go on
    for ever.
    """
    own = model.config.eos_token_id
    ids = {own} if isinstance(own, int) else set(own or ())
    return tokenizer.stop_ids | ids | {tokenizer.im_end_id}


def identity_of(model: Qwen2) -> bytes:
    """What tells this model's cached prefixes from those of another."""
    norm = model.model.norm.weight.detach().float().cpu().numpy().tobytes()
    return model.config.model_dump_json().encode() + norm
