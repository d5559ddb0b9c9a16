"""Perplexity and bits per byte: how many bits a model needs for a text.

Every token is predicted once, the first one after `<|endoftext|>`, as a document begins in
training. A text longer than the context is scored in windows that overlap by half, so that all but
the first tokens see at least half a context (strided windows, as is usual for perplexity).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwen2.model.decoder import Qwen2
from qwen2.tokenizer import Tokenizer

DEFAULT_CONTEXT = 2048
LOGIT_ROWS = 256  # rows of logits (rows, V) that exist at a time: 150 MB in fp32 at V = 152k


@dataclass(frozen=True)
class Score:
    """Sums over tokens, so that scores of parts add up to the score of the whole."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: Score) -> Score:
        return Score(self.nats + other.nats, self.tokens + other.tokens, self.bytes + other.bytes)

    @property
    def bits_per_byte(self) -> float:
        """Bits of the whole over its bytes in UTF-8: comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token."""
        return math.exp(self.nats / self.tokens) if self.tokens else math.nan


def score_text(
    model: Qwen2, tokenizer: Tokenizer, text: str, context: int = DEFAULT_CONTEXT
) -> Score:
    """The score of one document; `context` is the longest input of a forward pass, in tokens."""
    ids = [tokenizer.end_of_text_id, *tokenizer.encode(text)]
    nats = float(token_nats(model, ids, context).sum())
    return Score(nats, len(ids) - 1, len(text.encode()))


def score_by_kind(
    model: Qwen2,
    tokenizer: Tokenizer,
    texts: Mapping[str, Sequence[str]],
    context: int = DEFAULT_CONTEXT,
) -> dict[str, Score]:
    """The score of all texts of each kind together."""
    return {
        kind: sum((score_text(model, tokenizer, text, context) for text in each), Score())
        for kind, each in texts.items()
    }


@torch.inference_mode()
def token_nats(model: Qwen2, ids: Sequence[int], context: int) -> torch.Tensor:
    """-log p of ids[1:], each given those before it within the window: (len(ids) - 1,), fp32."""
    tokens = torch.tensor(ids, device=model.device)
    context = min(context, model.config.context_length)
    parts: list[torch.Tensor] = []
    scored = 0  # ids[1 : 1 + scored] have their figure
    while scored < len(ids) - 1:
        start = max(0, scored - context // 2) if scored else 0
        window = tokens[start : start + context + 1]
        inputs, targets = window[:-1], window[1:]
        hidden = model.model(
            inputs,
            torch.arange(len(inputs), device=model.device),
            model.packed([len(inputs)]),
        )
        fresh = slice(scored - start, None)
        for rows, goal in zip(
            hidden[fresh].split(LOGIT_ROWS), targets[fresh].split(LOGIT_ROWS), strict=True
        ):
            parts.append(F.cross_entropy(model.lm_head(rows).float(), goal, reduction="none"))
        scored = start + len(inputs)
    return torch.cat(parts).cpu() if parts else torch.zeros(0)
