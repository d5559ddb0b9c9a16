"""Decontamination: which documents hold what a test set asks (report, section 5.2.6).

The report drops a training sequence s_t when some test sequence s_e has |LCS(s_t, s_e)| >= 13 and
|LCS(s_t, s_e)| >= 0.6 min(|s_t|, |s_e|), both as token ids without symbols and punctuation
(stripped.py). LCS is the longest common *subsequence*: words may be put in between and left out.

What a sequence is, the report leaves open. A whole document cannot be one: any text of 10,000 words
has most of a question's words in order somewhere. Here the shorter one of document and test
sequence is taken whole, and of the longer one every stretch of twice its length, a quarter of a
stretch apart; so what is counted stands close together. Test items of more than 512 tokens are cut
into pieces of 512, each overlapping the next by half, which finds excerpts of long passages.

Within this definition no hit is missed (candidates.py), and each length is exact (lcs.py).

The analysis of test sets in the same section is another: any 13-gram of tokens that is in both,
`NgramOverlap`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from qwen2.common.config import Config
from qwen2.corpus.candidates import CELLS, Candidates
from qwen2.corpus.lcs import lcs_pairs, length_of, positions
from qwen2.corpus.shingles import U64
from qwen2.corpus.stripped import Encode, Stripped

PIECE = CELLS[-1]  # tokens of a test sequence at most
REMEMBERED = 1 << 14  # test sequences whose bits are kept


class LcsRule(Config):
    """When a common subsequence is too long."""

    tokens: int = Field(default=13, ge=1)
    share: float = Field(default=0.6, gt=0, le=1)
    """Of the shorter sequence."""

    def need(self, shorter: int) -> int:
        """The least length that is too long, exactly: 0.6 of 15 is 9."""
        return max(self.tokens, math.ceil(Fraction(str(self.share)) * shorter))


@dataclass(frozen=True)
class TestItem:
    """One item of a test set, as the text that a model must not have seen."""

    test_set: str
    id: str
    text: str


@dataclass(frozen=True)
class Hit:
    """The evidence that a document has an item."""

    test_set: str
    item: str
    length: int
    """Of the longest common subsequence, in tokens."""
    share: float
    """Of the shorter sequence."""
    document_tokens: int
    """Of the sequence s_t: the document or the stretch of it."""
    item_tokens: int
    """Of the sequence s_e: the item, or the piece or stretch of it."""
    document_span: tuple[int, int]
    """Characters from the first to the last word in common."""
    item_span: tuple[int, int]
    matched: str
    """The words in common as they are in the document; … where it has others between."""


@dataclass(frozen=True)
class _Match:
    length: int
    sequence: int
    document: tuple[int, int]  # tokens of s_t
    piece: tuple[int, int]  # tokens of s_e in its piece


class Decontaminator:
    """Finds the items of test sets in documents."""

    def __init__(
        self, items: Iterable[TestItem], encode: Encode, rule: LcsRule | None = None
    ) -> None:
        """`encode`: token ids of a string. Items of too few tokens cannot be found; see `short`."""
        self.rule = rule or LcsRule()
        self.stripped = Stripped(encode)
        self.items = list(items)
        self.short: list[TestItem] = []
        self._pieces: list[tuple[int, int]] = []  # item, first token
        sequences: list[NDArray[np.int64]] = []
        for number, item in enumerate(self.items):
            ids = self.stripped.ids(item.text)
            if len(ids) < self.rule.tokens:
                self.short.append(item)
            for start in _starts(len(ids), PIECE, PIECE // 2):
                self._pieces.append((number, start))
                sequences.append(ids[start : start + PIECE])
        self._index = Candidates(sequences, self.rule.need)
        self._bits: dict[int, dict[int, int]] = {}

    def hits(self, texts: Sequence[str]) -> list[list[Hit]]:
        """Of each text, its hits in the order of the items, one an item: the longest."""
        documents = [self._index.code(self.stripped.ids(text)) for text in texts]
        matches: list[dict[int, _Match]] = [{} for _ in texts]
        for number, sequence, low, high in self._index.inside(documents):
            self._note(matches[number], self._in_document(documents[number], sequence, low, high))
        for number, document in enumerate(documents):
            for sequence in self._index.around(document).tolist():
                self._note(matches[number], self._in_item(document, sequence))
        return [
            [self._evidence(text, document, match) for _, match in sorted(of.items())]
            for text, document, of in zip(texts, documents, matches, strict=True)
        ]

    def _note(self, of: dict[int, _Match], match: _Match | None) -> None:
        if match is not None:
            item = self._pieces[match.sequence][0]
            known = of.get(item)
            order = (-match.length, match.sequence, match.document, match.piece)
            if known is None or order < (
                -known.length, known.sequence, known.document, known.piece
            ):  # fmt: skip
                of[item] = match

    def _in_document(
        self, document: NDArray[np.int64], sequence: int, low: int, high: int
    ) -> _Match | None:
        """The best stretch of `document` that starts from `low` to `high`, if it is enough."""
        size = int(self._index.lengths[sequence])
        bits = self._bits_of(sequence)
        need = self.rule.need(size)
        starts = _starts(len(document), 2 * size, max(1, size // 2), low, high)
        best: tuple[int, int] | None = None
        if not starts:
            return None
        tokens = document[low : starts[-1] + 2 * size].tolist()
        matches = [bits.get(token, 0) for token in tokens]
        for start in starts:
            here = [x for x in matches[start - low : start - low + 2 * size] if x]
            if len(here) >= need:
                length = length_of(here, size)
                if length >= need and (best is None or length > best[0]):
                    best = length, start
        if best is None:
            return None
        end = min(best[1] + 2 * size, len(document))
        return _Match(best[0], sequence, (best[1], end), (0, size))

    def _in_item(self, document: NDArray[np.int64], sequence: int) -> _Match | None:
        """The best stretch of the test sequence that has the document, if it is enough."""
        size = len(document)
        bits = positions(document.tolist())
        coded = self._index.coded[sequence].tolist()
        best: tuple[int, int] | None = None
        for start in _starts(len(coded), 2 * size, max(1, size // 2)):
            here = [bits[x] for x in coded[start : start + 2 * size] if x in bits]
            if len(here) >= self.rule.need(size):
                length = length_of(here, size)
                if length >= self.rule.need(size) and (best is None or length > best[0]):
                    best = length, start
        if best is None:
            return None
        end = min(best[1] + 2 * size, len(coded))
        return _Match(best[0], sequence, (0, size), (best[1], end))

    def _bits_of(self, sequence: int) -> dict[int, int]:
        if sequence not in self._bits:
            if len(self._bits) >= REMEMBERED:
                self._bits.clear()
            self._bits[sequence] = positions(self._index.coded[sequence].tolist())
        return self._bits[sequence]

    def _evidence(self, text: str, document: NDArray[np.int64], match: _Match) -> Hit:
        number, first = self._pieces[match.sequence]
        item = self.items[number]
        ours = document[slice(*match.document)].tolist()
        theirs = self._index.coded[match.sequence][slice(*match.piece)].tolist()
        pairs = lcs_pairs(theirs, ours)
        assert len(pairs) == match.length
        in_text = self.stripped.spans(text)
        in_item = self.stripped.spans(item.text)
        words = [in_text[match.document[0] + j] for _, j in pairs]
        asked = [in_item[first + match.piece[0] + i] for i, _ in pairs]
        all_words = list(dict.fromkeys(in_text[slice(*match.document)]))
        return Hit(
            test_set=item.test_set,
            item=item.id,
            length=match.length,
            share=match.length / min(len(ours), len(theirs)),
            document_tokens=len(ours),
            item_tokens=len(theirs),
            document_span=(words[0][0], words[-1][1]),
            item_span=(asked[0][0], asked[-1][1]),
            matched=_quote(text, words, all_words),
        )


def _quote(text: str, words: Sequence[tuple[int, int]], all_words: list[tuple[int, int]]) -> str:
    """The words, with … where others stand between."""
    place = {word: i for i, word in enumerate(all_words)}
    said: list[str] = []
    last = -1
    for word in dict.fromkeys(words):
        if said and place[word] != last + 1:
            said.append("…")
        said.append(text[slice(*word)])
        last = place[word]
    return " ".join(said)


def _starts(
    size: int, stretch: int, step: int, low: int = 0, high: int | None = None
) -> Sequence[int]:
    """Starts from `low` to `high` of stretches `step` apart, until one reaches the end."""
    last = -(-max(0, size - stretch) // step) * step
    stop = last + 1 if high is None else min(high, last + 1)
    return range(-(-low // step) * step, stop, step)


class NgramOverlap:
    """Any n-gram of stripped tokens that a text has in common with a test item."""

    def __init__(self, items: Iterable[TestItem], encode: Encode, n: int = 13) -> None:
        self.stripped, self.n = Stripped(encode), n
        self.items = list(items)
        self._ids = [self.stripped.ids(item.text) for item in self.items]
        hashes = [ngram_hashes(ids, n) for ids in self._ids]
        flat = np.concatenate([np.empty(0, np.uint64), *hashes])
        order = np.argsort(flat, kind="stable")
        self._hashes = flat[order]
        sizes = [len(h) for h in hashes]
        self._item = np.repeat(np.arange(len(sizes)), sizes)[order]
        self._place = np.concatenate([np.empty(0, np.int64), *map(np.arange, sizes)])[order]

    def hits(self, text: str) -> Iterator[tuple[int, tuple[int, int], tuple[int, int]]]:
        """Of each item that shares an n-gram with `text`: its number in `items`, the first such
        n-gram of `text` as a span of characters, and its span in the item."""
        ids = self.stripped.ids(text)
        hashes = ngram_hashes(ids, self.n)
        low = np.searchsorted(self._hashes, hashes, "left")
        high = np.searchsorted(self._hashes, hashes, "right")
        seen = set()
        for i in np.flatnonzero(low < high):
            for at in range(low[i], high[i]):
                number, place = int(self._item[at]), int(self._place[at])
                same = ids[i : i + self.n] == self._ids[number][place : place + self.n]
                if number not in seen and same.all():
                    seen.add(number)
                    ours = self.stripped.spans(text)[i : i + self.n]
                    theirs = self.stripped.spans(self.items[number].text)[place : place + self.n]
                    yield number, (ours[0][0], ours[-1][1]), (theirs[0][0], theirs[-1][1])


def ngram_hashes(ids: NDArray[np.int64], n: int) -> U64:
    """(max(0, len(ids) - n + 1),): a hash of each n-gram."""
    count = max(0, len(ids) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for k in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[k : k + count].astype(np.uint64)
        hashes ^= hashes >> np.uint64(29)
    return hashes
