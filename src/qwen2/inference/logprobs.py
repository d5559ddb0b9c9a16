"""Log-probabilities of tokens, as the model gives them: before bias, penalties and temperature."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenLogprob:
    """ln p of a token, and the likeliest alternatives with theirs, the likeliest first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def token_logprobs(
    logits: Tensor, tokens: Sequence[int], top: int, vocabulary: int
) -> list[TokenLogprob]:
    """Of tokens (n,) after logits (n, V), with `top` alternatives among the first `vocabulary` ids.

    The probabilities are those of all V rows of the head, as in training.
    """
    total = logits.logsumexp(-1, keepdim=True)  # (n, 1)
    own = logits.gather(-1, torch.tensor(tokens)[:, None]) - total
    values, ids = logits[:, :vocabulary].topk(min(top, vocabulary))
    values = values - total
    return [
        TokenLogprob(token, logprob, tuple(zip(others, theirs, strict=True)))
        for token, logprob, others, theirs in zip(
            tokens, own[:, 0].tolist(), ids.tolist(), values.tolist(), strict=True
        )
    ]
