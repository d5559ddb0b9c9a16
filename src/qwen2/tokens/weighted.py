"""Rows of several sources by weight: what a chosen mixture is trained on.

Every source is an endless stream of rows of its own (loader.py), with its own epochs, so that none
is cut short and a small one comes again when its text is used up. Of each block of 4,096 places a
source has as many as its weight says, spread evenly: any stretch of places, and so every batch, has
the shares within a row or two a source. Which row stands at a place is a closed form of (weights,
seed, place): a run resumes anywhere, with other ranks or rows, as with one source.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2.common.errors import UserError
from qwen2.tokens.loader import PackedLoader, Packing, TokenSource
from qwen2.tokens.packing import NOTHING, Piece
from qwen2.tokens.shards import Shards

BLOCK = 4096
"""Places after which the sources come in the same order again; weights are rounded to 1 / BLOCK."""


class Subset:
    """Some documents of a source, as a source."""

    def __init__(self, source: TokenSource, numbers: NDArray[np.int64], name: str) -> None:
        self._source, self._numbers = source, numbers
        self.lengths: NDArray[np.int64] = source.lengths[numbers]
        self.fingerprint = f"{source.fingerprint} {name}"

    def document(self, number: int, /) -> NDArray[Any]:
        """(length,) token ids of a document."""
        return self._source.document(int(self._numbers[number]))

    def beneath(self, number: int) -> tuple[TokenSource, int]:
        """The source that a document is of, and its number there."""
        return self._source, int(self._numbers[number])


def by_kind(shards: Shards) -> dict[str, TokenSource]:
    """The documents of each kind as a source of their own."""
    kinds = shards.kinds
    return {
        kind: Subset(shards, np.flatnonzero(kinds == index), f"kind {kind}")
        for index, kind in enumerate(shards.index.kinds)
    }


class WeightedLoader(PackedLoader):
    """Endless iterator over batches whose rows come from `sources` by their `weights`.

    Args:
        sources: by name.
        weights: by name, normalised here; a source that is not named has none.

    Raises:
        UserError: a weight of an unknown source or below 0, or none above; and see `PackedLoader`.
    """

    def __init__(
        self,
        sources: Mapping[str, TokenSource],
        weights: Mapping[str, float],
        context: int,
        rows: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        packing: Packing = "stream",
    ) -> None:
        check_weights(weights, sources)
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        parts = [sources[name] for name in self.weights]
        super().__init__(_Joined(parts), context, rows, seed, rank, world_size, packing)
        self._parts = [PackedLoader(part, context, rows, seed, packing=packing) for part in parts]
        self._first = np.cumsum([0, *(len(part.lengths) for part in parts)])
        self._quotas = quotas(np.array(list(self.weights.values())))
        self._turns, self._numbers = spread_evenly(self._quotas)

    def row_pieces(self, place: int) -> list[Piece]:
        """The pieces of the row at `place`, all of one source."""
        block, turn = divmod(place, BLOCK)
        part = int(self._turns[turn])
        row = block * int(self._quotas[part]) + int(self._numbers[turn])
        first = int(self._first[part])
        return [
            piece if piece.document == NOTHING else piece._replace(document=first + piece.document)
            for piece in self._parts[part].row_pieces(row)
        ]

    def _identity(self) -> dict[str, Any]:
        return super()._identity() | {"weights": self.weights}


class _Joined:
    """The documents of several sources, one after the other."""

    def __init__(self, parts: list[TokenSource]) -> None:
        self._parts = parts
        self._first = np.cumsum([0, *(len(part.lengths) for part in parts)])
        self.lengths: NDArray[np.int64] = np.concatenate([part.lengths for part in parts])
        self.fingerprint = " + ".join(part.fingerprint for part in parts)

    def document(self, number: int, /) -> NDArray[Any]:
        source, local = self.beneath(number)
        return source.document(local)

    def beneath(self, number: int) -> tuple[TokenSource, int]:
        part = int(np.searchsorted(self._first, number, side="right")) - 1
        return self._parts[part], number - int(self._first[part])


def check_weights(weights: Mapping[str, float], sources: Mapping[str, object]) -> None:
    """Refuse weights that are not of these sources.

    Raises:
        UserError: says which.
    """
    for name, weight in weights.items():
        if name not in sources:
            raise UserError(f"weights: no source {name!r}; there are {', '.join(sources)}")
        if not 0 <= weight < float("inf"):
            raise UserError(f"weights: {name} has {weight}; give 0 or more")
    if not any(weight > 0 for weight in weights.values()):
        raise UserError("weights: none is above 0")


def quotas(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """(D,) weights above 0 -> (D,) places of a block, at least one each, by largest remainders."""
    assert 0 < len(weights) <= BLOCK, len(weights)
    wanted = weights / weights.sum() * BLOCK
    whole = np.maximum(np.floor(wanted).astype(np.int64), 1)
    while (missing := BLOCK - int(whole.sum())) > 0:
        whole[np.argsort(whole - wanted, kind="stable")[:missing]] += 1
    while whole.sum() > BLOCK:  # very small weights were raised to one place
        whole[np.argmax(whole - np.where(whole > 1, wanted, np.inf))] -= 1
    return whole


def spread_evenly(
    places: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(D,) places of each source -> the source at each place, and which of its own it is."""
    sources = np.repeat(np.arange(len(places)), places)
    numbers = np.concatenate([np.arange(count) for count in places])
    order = np.argsort((numbers + 0.5) / places[sources], kind="stable")
    return sources[order], numbers[order]
