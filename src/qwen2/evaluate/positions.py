"""Perplexity by position: whether a model still uses its context far from the beginning.

Report section 3.2 claims that the long-context stage lets a model process long text. In a model
that does, a token deep inside a document is no harder than one near its start; in one that was not
trained on such positions, the loss climbs where its training ended.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from qwen2.common.errors import UserError
from qwen2.common.plot import line_chart
from qwen2.evaluate.score import token_nats
from qwen2.model.decoder import Qwen2
from qwen2.model.extend import METHODS, extended

BUCKETS = 32
LABELS = {"none": "plain RoPE", "yarn": "static YARN", "dca": "DCA", "dca+yarn": "DCA + YARN"}
"""What charts and tables call the ways of extending a context."""


@dataclass(frozen=True)
class PositionNats:
    """Mean loss of the tokens in buckets of positions; bucket i has positions edges[i]:edges[i+1].

    A token's position counts the tokens of its document before it.
    """

    edges: list[int]
    nats: list[float]
    """Per token."""
    tokens: list[int]
    """Of all documents together."""

    @property
    def perplexity(self) -> list[float]:
        """exp of the mean loss in each bucket."""
        return [math.exp(min(value, 700.0)) for value in self.nats]  # e^710 is no float

    def mean(self, start: int, stop: int) -> float:
        """Mean loss of the buckets that begin in start:stop; NaN when none does."""
        inside = [i for i, edge in enumerate(self.edges[:-1]) if start <= edge < stop]
        tokens = sum(self.tokens[i] for i in inside)
        return sum(self.nats[i] * self.tokens[i] for i in inside) / tokens if tokens else math.nan


def nats_by_position(
    model: Qwen2, documents: Iterable[Sequence[int]], length: int, buckets: int = BUCKETS
) -> PositionNats:
    """The loss of the first `length` tokens of each document, from one forward pass for each.

    Args:
        model: give it a configuration of at least `length` positions, also to see what happens
            beyond those that it was trained on (`extend.with_config`).
        documents: token ids with the `<|endoftext|>` that stands before the first one; those of
            fewer than `length` tokens after it are left out.
        buckets: of equal width, give or take one position; at most `length`.

    Raises:
        UserError: the model's positions end before `length`, or no document is long enough.
    """
    if length > model.config.context_length:
        raise UserError(
            f"length {length}: the model's configuration ends at "
            f"{model.config.context_length} positions"
        )
    total, count = torch.zeros(length, dtype=torch.float64), 0
    for ids in documents:
        if len(ids) > length:
            total += token_nats(model, ids[: length + 1], length).double()
            count += 1
    if not count:
        raise UserError(f"length {length}: no document has so many tokens")
    buckets = min(buckets, length)
    edges = [length * i // buckets for i in range(buckets + 1)]
    widths = [stop - start for start, stop in itertools.pairwise(edges)]
    nats = [float(part.mean()) / count for part in total.split(widths)]
    return PositionNats(edges, nats, [width * count for width in widths])


def nats_by_method(
    model: Qwen2, documents: Sequence[Sequence[int]], length: int, buckets: int = BUCKETS
) -> dict[str, PositionNats]:
    """The same documents by `nats_by_position` through each way of extending, by its label."""
    return {
        LABELS[method]: nats_by_position(
            extended(model, length, method), documents, length, buckets
        )
        for method in METHODS
    }


def octaves(trained: int, length: int) -> list[tuple[int, int]]:
    """The trained length, then from each multiple of it to the double, up to `length`."""
    bounds = [(0, trained)]
    while bounds[-1][1] < length:
        bounds.append((bounds[-1][1], min(2 * bounds[-1][1], length)))
    return bounds


def position_chart(series: Mapping[str, PositionNats]) -> str:
    """Lines by name as SVG: loss over position, each bucket at its middle.

    Loss is the logarithm of perplexity: a model that fails far out leaves room for one that works.
    """
    lines = {
        name: [
            ((start + stop) / 2, value)
            for start, stop, value in zip(by.edges, by.edges[1:], by.nats, strict=False)
        ]
        for name, by in series.items()
    }
    return line_chart(lines, "position in the document, tokens", "nats per token")
