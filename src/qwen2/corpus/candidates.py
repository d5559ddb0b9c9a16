"""Which sequences may have a long common subsequence with which stretches of a document: no miss.

A common subsequence needs no common n-gram, so an index of n-grams would miss copies with words put
in. But it is no longer than what the two sequences have in common as multisets, and if T of m
tokens are found, then of any S of these m at least S - (m - T) are. So of each test sequence the
rarest tokens are indexed, m - T + k of them, and where fewer than k of them occur it cannot be.
That is asked of a segment of the document first and then of each stretch. Rarity is that within the
test sequences: it decides the speed, never the result.

Short sequences in long documents and short documents in long sequences both occur; what is the
shorter one decides T and is the side whose rarest tokens are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

I64 = NDArray[np.int64]
LONGEST = 512  # tokens of a sequence
GROUPS = (32, 128, LONGEST)  # longest sequence of each group of them
SPARE = 0.5  # k as a share of T: more means longer lists, and fewer candidates
SEGMENT = 512  # tokens of a document that are looked at together, and those that a stretch adds
MOST_BINS = 1 << 22
MOST_TIMES = 15  # a token that a sequence has more often counts however often it occurs
STEPS = 4  # of a stretch


def step_of(size: int) -> int:
    """Tokens from one stretch to the next, where the shorter side has `size` tokens.

    A stretch is `STEPS` of them: twice the shorter side, or two tokens more.
    """
    return (size + 1) // 2


@dataclass(frozen=True)
class Group:
    """Sequences of similar length, with the index of their rarest tokens."""

    longest: int
    sequences: I64
    """Numbers of the sequences."""
    needed: I64
    """How many of its indexed tokens must occur."""
    steps: I64
    starts: I64
    """(words + 1,): where the list of each token begins in `lists`."""
    lists: I64
    """Places in `sequences`."""
    times: I64
    """How often the sequence has the token, at most `MOST_TIMES`."""


class Candidates:
    """The index of the test sequences."""

    def __init__(self, sequences: Sequence[I64], need: Callable[[int], int]) -> None:
        """`need`: T for a shorter side of so many tokens. Sequences have at most `LONGEST`."""
        self.needs = [need(n) for n in range(LONGEST + 1)]
        self.lengths = np.array([len(s) for s in sequences], np.int64)
        assert not len(sequences) or self.lengths.max() <= LONGEST
        empty = np.empty(0, np.int64)
        self.words, flat = np.unique(np.concatenate([*sequences, empty]), return_inverse=True)
        self.coded = np.split(flat, np.cumsum(self.lengths)[:-1]) if len(sequences) else []
        self.frequency = np.bincount(flat, minlength=len(self.words))
        able = [i for i, n in enumerate(self.lengths.tolist()) if self.needs[n] <= n]
        self.able = np.array(able, np.int64)
        self.groups = []
        for low, high in zip((0, *GROUPS), GROUPS, strict=False):
            members = [i for i in able if low < self.lengths[i] <= high]
            if members:
                self.groups.append(self._group(high, members))
        sets = [np.unique(self.coded[i]) for i in able]
        places = np.repeat(np.arange(len(able)), [len(tokens) for tokens in sets])
        self.whole = self._by_token(np.concatenate([empty, *sets]), places)

    def code(self, ids: I64) -> I64:
        """Tokens by their number among those of the test sequences; -1 for others."""
        if not len(self.words):
            return np.full(len(ids), -1)
        places = np.minimum(np.searchsorted(self.words, ids), len(self.words) - 1)
        return np.where(self.words[places] == ids, places, -1)

    def inside(self, documents: Sequence[I64]) -> list[tuple[int, int, int]]:
        """(document, sequence, start): the stretches of documents in which a sequence that is no
        longer than the document may be found; a stretch may reach beyond the end.

        Args:
            documents: coded tokens of each.
        """
        found: list[tuple[int, int, int]] = []
        for group in self.groups:
            size = max(SEGMENT, STEPS * step_of(group.longest))
            segments = [
                (i, start, document[start : start + size + STEPS * step_of(group.longest)])
                for i, document in enumerate(documents)
                for start in range(0, len(document), size)
            ]
            together = max(1, MOST_BINS // len(group.sequences))
            for low in range(0, len(segments), together):
                part = segments[low : low + together]
                for at, place, start in self._search(group, [tokens for *_, tokens in part], size):
                    document, first, _ = part[at]
                    sequence = int(group.sequences[place])
                    if self.lengths[sequence] <= len(documents[document]):
                        found.append((document, sequence, first + start))
        return found

    def around(self, document: I64) -> I64:
        """The sequences longer than `document` in which it may be found."""
        n = len(document)
        if not (self.lengths > n).any() or self.needs[n] > n:
            return np.empty(0, np.int64)
        needed = self.needs[n]
        rarity = np.where(document < 0, -1, self.frequency[document])
        order = np.argsort(rarity, kind="stable")
        rarest = document[order[: n - needed + _spare(needed)]]
        starts, order = self.whole
        entries, _ = _gather(rarest[rarest >= 0], starts)
        counts = np.bincount(order[entries], minlength=len(self.able))
        enough = self.able[counts >= len(rarest) - (n - needed)]
        return enough[self.lengths[enough] > n]

    def _group(self, longest: int, members: list[int]) -> Group:
        tokens, times, needed = [], [], []
        for i in members:
            token, count = np.unique(self.coded[i], return_counts=True)
            order = np.lexsort([token, self.frequency[token]])
            need = self.needs[len(self.coded[i])]
            may_miss = len(self.coded[i]) - need
            total = np.cumsum(count[order])
            last = int(np.searchsorted(total, may_miss + _spare(need)))
            tokens.append(token[order[: last + 1]])
            times.append(count[order[: last + 1]])
            needed.append(int(total[last]) - may_miss)
        places = np.repeat(np.arange(len(members)), [len(t) for t in tokens])
        flat = np.concatenate(tokens)
        starts, lists = self._by_token(flat, places)
        order = np.argsort(flat, kind="stable")
        return Group(
            longest=longest,
            sequences=np.array(members, np.int64),
            needed=np.array(needed, np.int64),
            steps=np.array([step_of(len(self.coded[i])) for i in members], np.int64),
            starts=starts,
            lists=lists,
            times=np.minimum(np.concatenate(times)[order], MOST_TIMES),
        )

    def _by_token(self, tokens: I64, places: I64) -> tuple[I64, I64]:
        counts = np.bincount(tokens, minlength=len(self.words))
        return np.cumsum([0, *counts]), places[np.argsort(tokens, kind="stable")]

    def _search(
        self, group: Group, segments: Sequence[I64], size: int
    ) -> list[tuple[int, int, int]]:
        """(segment, place in the group, start): stretches that start in a segment's first `size`
        tokens and have enough of the sequence's indexed tokens."""
        sizes = [len(tokens) for tokens in segments]
        words, number = len(self.words), len(group.sequences)
        flat = np.concatenate(segments)
        place = np.arange(len(flat)) - np.repeat(np.cumsum([0, *sizes[:-1]]), sizes)
        keys = np.repeat(np.arange(len(segments)), sizes) * words + flat
        keys, place = keys[flat >= 0], place[flat >= 0]
        order = np.argsort(keys, kind="stable")
        keys, place = keys[order], place[order]
        begins = np.flatnonzero(np.diff(keys, prepend=-1))
        occurs = np.diff(begins, append=len(keys))
        segment, token = np.divmod(keys[begins], words)

        # Enough in the segment: each entry is a token of a segment and a sequence that has it.
        entries, owner = _gather(token, group.starts)
        pair = segment[owner] * number + group.lists[entries]
        counts = np.minimum(occurs[owner], group.times[entries])
        total = np.bincount(pair, counts, minlength=number * len(segments))
        enough = (total >= np.tile(group.needed, len(segments)))[pair]

        # Enough in a stretch: each entry is an occurrence, in each stretch that has it.
        pair, entries, owner = pair[enough], entries[enough], owner[enough]
        at, which = _expand(begins[owner], occurs[owner])
        pair, entries, token = pair[which], entries[which], token[owner[which]]
        last = place[at] // group.steps[pair % number]
        stretches = 2 * size // step_of(1)  # more than a segment has
        bits = [(last >= k, pair * stretches + last - k) for k in range(STEPS)]
        low = token * (MOST_TIMES + 1) + group.times[entries]
        span = words * (MOST_TIMES + 1)
        rows = np.sort(np.concatenate([(key * span + low)[fits] for fits, key in bits]))
        begins = np.flatnonzero(np.diff(rows, prepend=-1))
        times = rows[begins] % (MOST_TIMES + 1)
        counts = np.diff(begins, append=len(rows))
        counts = np.where(times < MOST_TIMES, np.minimum(counts, times), counts)
        stretch = rows[begins] // span
        begins = np.flatnonzero(np.diff(stretch, prepend=-1))
        total = np.add.reduceat(counts, begins) if len(begins) else begins
        pair, start = np.divmod(stretch[begins], stretches)
        start *= group.steps[pair % number]
        passed = (total >= group.needed[pair % number]) & (start < size)
        segment, sequence = np.divmod(pair[passed], number)
        return list(zip(segment.tolist(), sequence.tolist(), start[passed].tolist(), strict=True))


def _spare(needed: int) -> int:
    return max(1, int(SPARE * needed))


def _gather(tokens: I64, starts: I64) -> tuple[I64, I64]:
    """Where the lists of all tokens are, one after the other, and whose each entry is."""
    return _expand(starts[tokens], starts[tokens + 1] - starts[tokens])


def _expand(starts: I64, lengths: I64) -> tuple[I64, I64]:
    """The ranges from `starts` of `lengths`, one after the other, and which each comes from."""
    owner = np.repeat(np.arange(len(starts)), lengths)
    before = np.cumsum(lengths) - lengths
    return np.arange(len(owner)) + (starts - before)[owner], owner
