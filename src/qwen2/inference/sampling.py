"""Choosing the next token from logits: pure functions, randomness passed in.

The order is that of the published `generation_config.json` in transformers: repetition penalty,
temperature, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from qwen2.common.config import Config


class SamplingParams(Config):
    """How one completion is drawn; temperature 0 is greedy."""

    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=100)
    top_k: int = Field(default=0, ge=0)  # 0: all tokens
    top_p: float = Field(default=1.0, gt=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)  # Keskar et al. 2019
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False

    def generator(self) -> torch.Generator:
        """A source of randomness of this completion's own, so that a batch changes nothing."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def sample(
    logits: Tensor, seen: Sequence[int], params: SamplingParams, generator: torch.Generator
) -> int:
    """The next token from logits (V,), where `seen` holds the ids of prompt and output so far."""
    logits = penalize(logits.float().cpu(), seen, params.repetition_penalty)
    if params.temperature == 0:
        return int(logits.argmax())
    tokens, probabilities = candidates(logits, params)
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])


def penalize(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of `seen` tokens by `penalty`."""
    if penalty == 1.0:
        return logits
    rows = torch.tensor(seen)
    values = logits[rows]
    return logits.index_put((rows,), torch.where(values > 0, values / penalty, values * penalty))


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities, most likely first.

    Top-p keeps the smallest set whose probability reaches p, and so always one token.
    """
    V = logits.numel()
    logits = logits / params.temperature
    if params.top_k == 0 and params.top_p == 1.0:
        return torch.arange(V), logits.softmax(-1)
    # To sort the whole vocabulary costs as much as a third of a decode step of the 0.5B, and
    # the nucleus nearly always lies among the first thousand.
    kept = params.top_k or V
    for size in sorted({min(kept, 1024), min(kept, V)}):
        values, tokens = logits.topk(min(size, V))
        # Under top-k the rest has no probability; without it, the rest counts in the sum.
        total = (values if params.top_k else logits).logsumexp(-1)
        probabilities = (values - total).exp()
        before = probabilities.cumsum(-1) - probabilities
        if size == min(kept, V) or before[-1] >= params.top_p:
            break
    inside = before < params.top_p
    inside[0] = True
    if params.top_p == 1.0:  # a sum that rounds to 1 early must not end the top k
        inside[:] = True
    return tokens[inside], probabilities[inside]
