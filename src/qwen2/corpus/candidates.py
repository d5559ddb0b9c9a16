"""Which sequences may have a long common subsequence with which places of a document: no miss.

A common subsequence needs no common n-gram, so an index of n-grams would miss copies with words put
in. But it is no longer than what the two sequences have in common as multisets, and if T of m
tokens are found, then of any S of these m at least S - (m - T) are. So of each test sequence the
rarest tokens are indexed, m - T + k of them, and a place where fewer than k of them occur cannot
match. Rarity is that within the test sequences: it decides the speed, never the result.

Short sequences in long documents and short documents in long sequences both occur; what is the
shorter one decides T and is the side whose rarest tokens are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
CELLS = (32, 128, 512)  # tokens; a sequence is counted in cells that are no shorter than itself
SPARE = 0.5  # k as a share of T: more means longer lists, and fewer candidates
SEGMENT = 1024  # tokens that are counted together
MOST_BINS = 1 << 22


@dataclass(frozen=True)
class Group:
    """The test sequences that are no longer than `cell`, with the index of their rarest tokens."""

    cell: int
    sequences: I64
    """Numbers of the sequences."""
    needed: I64
    """How many of its indexed tokens must occur."""
    starts: I64
    """(words + 1,): where the list of each token begins in `lists`."""
    lists: I64
    """Places in `sequences`."""


class Candidates:
    """The index of the test sequences."""

    def __init__(self, sequences: Sequence[I64], need: Callable[[int], int]) -> None:
        """`need`: T for a shorter side of so many tokens. Sequences have at most CELLS[-1]."""
        self.need = need
        self.lengths = np.array([len(s) for s in sequences], np.int64)
        assert not len(sequences) or self.lengths.max() <= CELLS[-1]
        self.words, flat = np.unique(np.concatenate([*sequences, np.empty(0, np.int64)]),
                                     return_inverse=True)  # fmt: skip
        self.coded = np.split(flat, np.cumsum(self.lengths)[:-1]) if len(sequences) else []
        self.frequency = np.bincount(flat, minlength=len(self.words))
        able = [i for i, n in enumerate(self.lengths.tolist()) if need(n) <= n]
        bounds = (0, *CELLS)
        self.groups = [
            self._group(cell, [i for i in able if low < self.lengths[i] <= cell])
            for low, cell in zip(bounds, CELLS, strict=False)
        ]
        self.whole = self._lists([(i, np.unique(self.coded[i])) for i in able])
        self.able = np.array(able, np.int64)

    def code(self, ids: I64) -> I64:
        """Tokens by their number among those of the test sequences; -1 for others."""
        if not len(self.words):
            return np.full(len(ids), -1)
        places = np.minimum(np.searchsorted(self.words, ids), len(self.words) - 1)
        return np.where(self.words[places] == ids, places, -1)

    def inside(self, documents: Sequence[I64]) -> list[tuple[int, int, int, int]]:
        """(document, sequence, start, end): where a sequence that is no longer than the document
        may be found: in a stretch of at most twice its length that starts there.

        Args:
            documents: coded tokens of each.
        """
        found: list[tuple[int, int, int, int]] = []
        for group in self.groups:
            if not len(group.sequences):
                continue
            segments = [
                (i, start, document[start : start + SEGMENT + 2 * group.cell])
                for i, document in enumerate(documents)
                for start in range(0, len(document), SEGMENT)
            ]
            together = max(1, MOST_BINS // len(group.sequences))
            for low in range(0, len(segments), together):
                found += self._count(group, segments[low : low + together], documents)
        return found

    def around(self, document: I64) -> I64:
        """The sequences longer than `document` in which it may be found."""
        n = len(document)
        needed = self.need(n)
        if needed > n or not (self.lengths > n).any():
            return np.empty(0, np.int64)
        spare = max(1, int(SPARE * needed))
        rarity = np.where(document < 0, -1, self.frequency[document])
        rarest = document[np.argsort(rarity, kind="stable")[: n - needed + spare]]
        starts, lists = self.whole
        known = rarest[rarest >= 0]
        counts = np.bincount(_gather(known, starts, lists)[0], minlength=len(self.able))
        enough = self.able[counts >= len(rarest) - (n - needed)]
        return enough[self.lengths[enough] > n]

    def _group(self, cell: int, members: list[int]) -> Group:
        chosen, needed = [], []
        for place, i in enumerate(members):
            tokens, counts = np.unique(self.coded[i], return_counts=True)
            order = np.lexsort([tokens, self.frequency[tokens]])
            may_miss = len(self.coded[i]) - self.need(len(self.coded[i]))
            spare = max(1, int(SPARE * self.need(len(self.coded[i]))))
            total = np.cumsum(counts[order])
            last = int(np.searchsorted(total, may_miss + spare))
            chosen.append((place, tokens[order[: last + 1]]))
            needed.append(int(total[last]) - may_miss)
        starts, lists = self._lists(chosen)
        return Group(cell, np.array(members, np.int64), np.array(needed, np.int64), starts, lists)

    def _lists(self, of: Sequence[tuple[int, I64]]) -> tuple[I64, I64]:
        """Lists of places by token, from the tokens of each place."""
        tokens = np.concatenate([np.empty(0, np.int64), *(t for _, t in of)])
        places = np.repeat(np.arange(len(of)), [len(t) for _, t in of])
        counts = np.bincount(tokens, minlength=len(self.words))
        return np.cumsum([0, *counts]), places[np.argsort(tokens, kind="stable")]

    def _count(
        self, group: Group, segments: Sequence[tuple[int, int, I64]], documents: Sequence[I64]
    ) -> list[tuple[int, int, int, int]]:
        sizes = [len(tokens) for _, _, tokens in segments]
        flat = np.concatenate([tokens for _, _, tokens in segments])
        segment = np.repeat(np.arange(len(segments)), sizes)
        place = np.arange(len(flat)) - np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
        known = flat >= 0
        flat, segment, cell = flat[known], segment[known], place[known] // group.cell
        sequence, lengths = _gather(flat, group.starts, group.lists)
        number = len(group.sequences)
        of = np.repeat(segment, lengths) * number + sequence
        enough = np.bincount(of, minlength=number * len(segments)) >= np.tile(
            group.needed, len(segments)
        )
        kept = enough[of]
        cells = SEGMENT // group.cell + 4  # two more of the overlap, and two that stay empty
        keys, counts = np.unique(
            of[kept] * cells + np.repeat(cell, lengths)[kept] + 2, return_counts=True
        )
        # A stretch that starts in a cell has its end in one of the next two.
        firsts = np.unique(np.concatenate([keys, keys - 1, keys - 2]))
        sums = np.zeros(len(firsts), np.int64)
        for ahead in range(3):
            at = np.minimum(np.searchsorted(keys, firsts + ahead), len(keys) - 1)
            if len(keys):
                sums += np.where(keys[at] == firsts + ahead, counts[at], 0)
        pair, first = np.divmod(firsts, cells)
        passed = (sums >= group.needed[pair % number]) & (first >= 2)
        passed &= first < 2 + SEGMENT // group.cell
        found = []
        for p, f in zip(pair[passed].tolist(), (first[passed] - 2).tolist(), strict=True):
            document, start, _ = segments[p // number]
            i = int(group.sequences[p % number])
            if self.lengths[i] <= len(documents[document]):
                low = start + f * group.cell
                found.append((document, i, low, low + group.cell))
        return found


def _gather(tokens: I64, starts: I64, lists: I64) -> tuple[I64, I64]:
    """The lists of all tokens, one after the other, and the length of each."""
    lengths = starts[tokens + 1] - starts[tokens]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return lists[np.arange(total) + np.repeat(starts[tokens] - (ends - lengths), lengths)], lengths
