"""Best-fit packing: rows in which documents shorter than the context are hardly ever cut.

After Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv:2404.10830): a document
longer than the context C gives as many full rows as it fills; its rest, and every shorter
document, is an item. Items are packed by best-fit decreasing: from the largest to the smallest,
each into the fullest row that has room for it. Differences to the paper:

- All documents of an epoch are packed at once, exactly as one by one, but by counts. Items of one
  size are alike: rows with the same room take them in blocks, and each size visits few different
  rooms, since a room that was visited is smaller than that size thereafter. So the packing costs
  O(documents) in numpy and O(C) steps in Python.
- The packing of sizes, `BestFitPlan`, depends on lengths and C alone. An epoch only shuffles which
  of the documents of one size goes where, and the order of the rows. So every epoch has the same
  number of rows, and each row is a closed form of (lengths, seed, C, place).
- Rows that stay open are padded as long as no more than `PADDING` of all is that. If it were more
  (when there are too few short documents), the emptiest rows are dissolved, and cut to fill the
  room of the others. So no corpus costs more than that: with documents of 0.6 C, packing as in the
  paper would pad 40 %.

Which documents share a row matters little, for they do not see each other.
"""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from qwen2.tokens.packing import NOTHING, Piece, shuffled

PADDING = 0.01
"""Largest share of padding, apart from one row an epoch."""


class BestFitPlan:
    """Rows of an epoch as sizes: what is the same in every epoch.

    Items are ranked from the largest to the smallest. Memory: 4 bytes a document and 8 a row.

    Attributes:
        full: rows of one piece of a longer document; they come first.
        rows: all rows.
        cuts: how often an item is cut, beyond the cuts that every document longer than C needs.
        padding: tokens of padding.
    """

    def __init__(self, lengths: NDArray[np.int64], context: int) -> None:
        assert len(lengths) < 1 << 32, "items are numbered by 32 bits"
        self.context = context
        self._long = np.flatnonzero(lengths >= context)
        self._long_ends = np.cumsum(lengths[self._long] // context)
        self.full = int(self._long_ends[-1]) if len(self._long) else 0
        counts = np.bincount(lengths % context, minlength=context)
        counts[0] = 0
        bins = best_fit_decreasing(counts, context)  # (items,) the bin of each
        self.items = len(bins)
        sizes = np.repeat(np.arange(context)[::-1], counts[::-1]).astype(np.uint32)
        room = context - np.bincount(bins, sizes).astype(np.int64)  # (bins,)
        kept = min(len(room), math.ceil(int(sizes.sum()) / (context * (1 - PADDING))))
        self.rows = self.full + kept
        order = np.argsort(room, kind="stable")  # the fullest first
        place = np.empty(len(room), np.uint32)
        place[order] = np.arange(len(room), dtype=np.uint32)
        bins = place[bins]
        whole = bins < kept
        self._cut_to_fill(np.flatnonzero(~whole), sizes, room[order[:kept]])
        ranks = np.flatnonzero(whole).astype(np.uint32)
        bins = bins[whole]
        self._ranks = ranks[np.argsort(bins, kind="stable")]  # row by row
        self._first = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=kept))])
        self.padding = kept * context - int(sizes.sum())

    def _cut_to_fill(
        self, dissolved: NDArray[np.int64], sizes: NDArray[np.uint32], room: NDArray[np.int64]
    ) -> None:
        """Lay the items `dissolved` end to end into the rows' room, the largest room first."""
        into = np.arange(len(room))[::-1]
        item_ends, room_ends = np.cumsum(sizes[dissolved], dtype=np.int64), np.cumsum(room[into])
        total = int(item_ends[-1]) if len(dissolved) else 0
        stops = np.union1d(item_ends, room_ends[room_ends < total])
        starts = np.concatenate([[0], stops])[:-1]
        item = np.searchsorted(item_ends, starts, side="right")
        before = (item_ends - sizes[dissolved])[item]
        row = into[np.searchsorted(room_ends, starts, side="right")]
        by_row = np.argsort(row, kind="stable")
        self._fill_rows = row[by_row]
        self._fill = np.stack([dissolved[item], starts - before, stops - before], axis=1)[by_row]
        self.cuts = len(stops) - len(dissolved)

    def long_piece(self, row: int) -> Piece:
        """What fills one of the first `full` rows."""
        index = int(np.searchsorted(self._long_ends, row, side="right"))
        number = row - (int(self._long_ends[index - 1]) if index else 0)
        start = number * self.context
        return Piece(int(self._long[index]), start, start + self.context)

    def items_of(self, row: int) -> tuple[list[int], list[list[int]]]:
        """Of one of the other rows: ranks of its whole items; rank, start, stop of pieces."""
        row -= self.full
        first, last = self._first[row : row + 2]
        begin, end = np.searchsorted(self._fill_rows, [row, row + 1])
        pieces: list[list[int]] = self._fill[begin:end].tolist()
        return self._ranks[first:last].tolist(), pieces


class BestFitRows:
    """The endless sequence of rows of best-fit packed epochs."""

    def __init__(self, lengths: NDArray[np.int64], context: int, seed: int) -> None:
        self._lengths, self.context, self.seed = lengths, context, seed
        self._epoch, self._order = -1, np.empty(0, np.uint32)

    @cached_property
    def plan(self) -> BestFitPlan:
        """Made when the first row is asked for."""
        return BestFitPlan(self._lengths, self.context)

    def pieces(self, place: int) -> list[Piece]:
        """The pieces of the row at `place`; the rows of an epoch are shuffled."""
        plan, context = self.plan, self.context
        epoch, index = divmod(place, plan.rows)
        row = shuffled(index, plan.rows, f"{self.seed}/{epoch}".encode())
        if row < plan.full:
            return [plan.long_piece(row)]
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffle(epoch)
        whole, cut = plan.items_of(row)
        pieces = []
        for rank, start, stop in [*((rank, 0, context) for rank in whole), *cut]:
            document = int(self._order[rank])
            length = int(self._lengths[document])
            before = length // context * context  # in the full rows
            pieces.append(Piece(document, before + start, min(before + stop, length)))
        room = context - sum(piece.stop - piece.start for piece in pieces)
        return [*pieces, Piece(NOTHING, 0, room)] if room else pieces

    def _shuffle(self, epoch: int) -> NDArray[np.uint32]:
        """(items,) the document of each rank: larger items first, those of one size shuffled."""
        # The raw stream, as in packing.py: the same in every version of numpy.
        keys = np.random.PCG64([self.seed, epoch]).random_raw(len(self._lengths))
        bits = np.uint64(self.context.bit_length())
        keys >>= bits
        smaller = (self.context - self._lengths % self.context).astype(np.uint64)
        keys |= smaller << (np.uint64(64) - bits)  # no item is as long as the context: those last
        return np.argsort(keys, kind="stable")[: self.plan.items].astype(np.uint32)


def best_fit_decreasing(counts: NDArray[np.int64], context: int) -> NDArray[np.uint32]:
    """Pack counts[s] items of each size s into bins of `context`.

    Returns:
        (items,) the bin of each item, from the largest to the smallest: each goes into the fullest
        bin that has room for it, or else into a new one.
    """
    bin_of = np.empty(int(counts.sum()), np.uint32)
    with_room: dict[int, list[NDArray[np.uint32]]] = {}
    rooms = 0  # bit r is set when some bins have room r
    item = bins = 0
    for size in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[size])
        while left:
            if higher := rooms >> size:
                room = size + (higher & -higher).bit_length() - 1
                rooms ^= 1 << room
                found = np.concatenate(with_room.pop(room))
            else:
                room = context
                found = np.arange(bins, bins - left // -(room // size), dtype=np.uint32)
                bins += len(found)
            # A bin that took one is now the fullest: it takes more until it has no room.
            each = room // size
            taken = min(left, each * len(found))
            filled, rest = divmod(taken, each)
            bin_of[item : item + taken] = np.repeat(found[: filled + (rest > 0)], each)[:taken]
            item, left = item + taken, left - taken
            for after, some in (
                (room - each * size, found[:filled]),
                (room - rest * size, found[filled : filled + (rest > 0)]),
                (room, found[filled + (rest > 0) :]),
            ):
                if after and len(some):
                    with_room.setdefault(after, []).append(some)
                    rooms |= 1 << after
    return bin_of
