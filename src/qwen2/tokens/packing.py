"""Packing: documents laid end to end into rows of exactly `context` tokens.

This is packing as a stream; best_fit.py has the other. An epoch lays all documents in an order of
its own, one after the other; epochs follow each other without a gap, and the endless stream is cut
into rows every `context` tokens. Rows are then taken in a shuffled order, lest a book fill one
batch after the other with itself. A document that crosses the end of a row is cut there into
pieces, never shortened. Each piece is a document of its own to attention: positions restart at 0
and nothing is seen across its start. All functions are pure: row r of the stream depends on
(lengths, seed, context, r) alone.

Every token of every document is predicted exactly once, from the token before it; before the first
stands the `<|endoftext|>` that ends documents. So a model learns how documents begin, and to
complete or to score a text after `<|endoftext|>` is nothing new to it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

IGNORE = -100  # as a target: nothing is predicted here
NOTHING = -1  # as a document: padding


class Piece(NamedTuple):
    """Tokens start:stop of a document, or padding of so many where that is `NOTHING`."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class PackedBatch:
    """Rows of packed pieces, flat; N = rows x context."""

    tokens: torch.Tensor
    """(N,) int64: what the model is given."""
    targets: torch.Tensor
    """(N,) int64: what follows each of them; `IGNORE` where there is padding."""
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


class StreamRows:
    """The endless sequence of rows that the epochs, one after the other, are cut into."""

    def __init__(self, lengths: NDArray[np.int64], context: int, seed: int) -> None:
        self._lengths, self.context, self.seed = lengths, context, seed
        self.epoch_tokens = int(lengths.sum())
        self._layouts: dict[int, EpochLayout] = {}

    def pieces(self, place: int) -> list[Piece]:
        """The pieces of the row at `place`; rows that begin in the same epoch are shuffled."""
        epoch = place * self.context // self.epoch_tokens
        first = -(-epoch * self.epoch_tokens // self.context)
        count = -(-(epoch + 1) * self.epoch_tokens // self.context) - first
        key = f"{self.seed}/{epoch}".encode()
        row = first + shuffled(place - first, count, key)
        start, stop = row * self.context, (row + 1) * self.context
        pieces: list[Piece] = []
        while start < stop:
            epoch, offset = divmod(start, self.epoch_tokens)
            length = min(stop - start, self.epoch_tokens - offset)
            pieces += self._layout(epoch).pieces(offset, offset + length)
            start += length
        return pieces

    def _layout(self, epoch: int) -> EpochLayout:
        if epoch not in self._layouts:
            # A row can straddle two epochs, so a neighbour is kept too.
            self._layouts = {e: v for e, v in self._layouts.items() if abs(e - epoch) == 1}
            self._layouts[epoch] = lay_epoch(self._lengths, self.seed, epoch)
        return self._layouts[epoch]


def shuffled(index: int, size: int, key: bytes) -> int:
    """Where `index` goes in a permutation of range(size) that `key` chooses, at constant cost.

    A Feistel network over the next power of four; places beyond `size` are walked on from. It needs
    no memory, where a permutation of the rows of 7T tokens would fill 14 GB.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    while True:
        left, right = index >> half, index & ((1 << half) - 1)
        for turn in range(4):
            message = turn.to_bytes(1) + right.to_bytes(8)
            digest = hashlib.blake2b(message, digest_size=8, key=key).digest()
            mixed = int.from_bytes(digest) & ((1 << half) - 1)
            left, right = right, left ^ mixed
        index = left << half | right
        if index < size:
            return index


def pack(pieces: Iterable[Piece], document: Callable[[int], NDArray[Any]]) -> PackedBatch:
    """Lay `pieces` end to end; `document(i)` gives the token ids (length,) of document i.

    A document ends with its `<|endoftext|>`, which is also the input before its first token, and
    what padding is made of.
    """
    pieces = list(pieces)
    lengths = [piece.stop - piece.start for piece in pieces]
    N = sum(lengths)
    tokens, targets, positions = (np.empty(N, np.int64) for _ in range(3))
    at, ids = 0, np.empty(0, np.int64)
    for piece, length in zip(pieces, lengths, strict=True):
        here = slice(at, at + length)
        positions[here] = np.arange(length)
        at += length
        if piece.document == NOTHING:
            tokens[here], targets[here] = ids[-1], IGNORE  # there is a piece before
            continue
        ids = document(piece.document)
        tokens[here.start] = ids[piece.start - 1]  # at the start of the document, <|endoftext|>
        tokens[here.start + 1 : at] = ids[piece.start : piece.stop - 1]
        targets[here] = ids[piece.start : piece.stop]
    flat = [torch.from_numpy(array) for array in (tokens, targets, positions)]
    return PackedBatch(flat[0], flat[1], flat[2], lengths)
