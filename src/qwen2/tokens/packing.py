"""Packing: documents laid end to end into rows of exactly `context` tokens.

An epoch lays all documents in an order of its own, one after the other; epochs follow each other
without a gap, and the endless stream is cut into rows every `context` tokens. A document that
crosses the end of a row is cut there into pieces, never shortened. Each piece is a document of its
own to attention: positions restart at 0 and nothing is seen across its start. All functions are
pure: row r of the stream depends on (lengths, seed, context, r) alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

IGNORE = -100  # target of a token that predicts nothing, as in torch's cross-entropy


class Piece(NamedTuple):
    """Tokens start:stop of a document."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class PackedBatch:
    """Rows of packed pieces, flat; N = rows x context."""

    tokens: torch.Tensor
    """(N,) int64."""
    targets: torch.Tensor
    """(N,) int64: the token that follows in the document, -100 after a document's last one."""
    positions: torch.Tensor
    """(N,) int64, from 0 in each piece."""
    lengths: list[int]
    """Tokens of each piece in order; their sum is N. No piece crosses a multiple of `context`."""


@dataclass(frozen=True)
class EpochLayout:
    """All documents of one epoch in their order."""

    order: NDArray[np.int64]
    """(documents,) document at each place."""
    ends: NDArray[np.int64]
    """(documents,) tokens laid up to and with each place."""

    def pieces(self, start: int, stop: int) -> list[Piece]:
        """The pieces of documents that lie in tokens start:stop of the epoch."""
        pieces = []
        place = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            begin = int(self.ends[place - 1]) if place else 0
            end = min(int(self.ends[place]), stop)
            pieces.append(Piece(int(self.order[place]), start - begin, end - begin))
            start, place = end, place + 1
        return pieces


def lay_epoch(lengths: NDArray[np.int64], seed: int, epoch: int) -> EpochLayout:
    """The layout of an epoch: a shuffle of the documents by (seed, epoch).

    The raw stream of PCG64 is the same in every version of numpy; `permutation` need not be.
    """
    keys = np.random.PCG64([seed, epoch]).random_raw(len(lengths))
    order = np.argsort(keys, kind="stable")
    return EpochLayout(order, np.cumsum(lengths[order]))


def pack(pieces: Iterable[Piece], document: Callable[[int], NDArray[Any]]) -> PackedBatch:
    """Lay `pieces` end to end; `document(i)` gives the token ids (length,) of document i.

    The last token of a piece has the document's next token as its target, so that a cut loses no
    prediction; at the end of the document there is none.
    """
    pieces = list(pieces)
    lengths = [piece.stop - piece.start for piece in pieces]
    N = sum(lengths)
    tokens, positions = np.empty(N, np.int64), np.empty(N, np.int64)
    targets = np.full(N, IGNORE, np.int64)
    at = 0
    for piece, length in zip(pieces, lengths, strict=True):
        ids = document(piece.document)
        following = ids[piece.start + 1 : piece.stop + 1]
        tokens[at : at + length] = ids[piece.start : piece.stop]
        targets[at : at + len(following)] = following
        positions[at : at + length] = np.arange(length)
        at += length
    return PackedBatch(
        torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(positions), lengths
    )
