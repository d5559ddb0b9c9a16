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
from pydantic import Field

from qwen2.common.config import Config
from qwen2.corpus.candidates import I64, LONGEST, STEPS, Candidates, step_of
from qwen2.corpus.lcs import lcs_pairs, length_of, positions
from qwen2.corpus.shingles import U64
from qwen2.corpus.stripped import Encode, Stripped

Span = tuple[int, int]  # characters
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
class EvalItem:
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
    document_span: Span
    """Characters from the first to the last word in common."""
    item_span: Span
    matched: str
    """The words in common as they are in the document; … where it has others between."""


@dataclass(frozen=True)
class _Match:
    length: int
    sequence: int
    document: tuple[int, int]  # tokens of s_t
    piece: tuple[int, int]  # tokens of s_e in its piece

    def rank(self) -> tuple[int, int, tuple[int, int], tuple[int, int]]:
        """The longest first, then the first."""
        return -self.length, self.sequence, self.document, self.piece


class Decontaminator:
    """Finds the items of test sets in documents."""

    def __init__(
        self, items: Iterable[EvalItem], encode: Encode, rule: LcsRule | None = None
    ) -> None:
        """`encode`: token ids of a string. Items of too few tokens cannot be found; see `short`."""
        self.rule = rule or LcsRule()
        self.stripped = Stripped(encode)
        self.items = list(items)
        self.short: list[EvalItem] = []
        self._pieces: list[tuple[int, int]] = []  # item, first token
        sequences: list[I64] = []
        for number, item in enumerate(self.items):
            ids = self.stripped.ids(item.text)
            if len(ids) < self.rule.tokens:
                self.short.append(item)
            for start in _starts(len(ids), LONGEST, LONGEST // 2):
                self._pieces.append((number, start))
                sequences.append(ids[start : start + LONGEST])
        self._index = Candidates(sequences, self.rule.need)
        self._bits: dict[int, dict[int, int]] = {}

    def hits(self, texts: Sequence[str]) -> list[list[Hit]]:
        """Of each text, its hits in the order of the items, one an item: the longest."""
        documents = [self._index.code(self.stripped.ids(text)) for text in texts]
        matches: list[dict[int, _Match]] = [{} for _ in texts]
        for number, sequence, start in self._index.inside(documents):
            self._note(matches[number], self._in_document(documents[number], sequence, start))
        for number, document in enumerate(documents):
            for sequence in self._index.around(document).tolist():
                self._note(matches[number], self._in_item(document, sequence))
        return [
            self._evidence(text, document, [match for _, match in sorted(of.items())])
            for text, document, of in zip(texts, documents, matches, strict=True)
        ]

    def _note(self, of: dict[int, _Match], match: _Match | None) -> None:
        if match is not None:
            item = self._pieces[match.sequence][0]
            known = of.get(item)
            if known is None or match.rank() < known.rank():
                of[item] = match

    def _in_document(self, document: I64, sequence: int, start: int) -> _Match | None:
        """The match of the stretch of `document` from `start`, if it is enough."""
        size = int(self._index.lengths[sequence])
        end = min(start + STEPS * step_of(size), len(document))
        length = self._length(document[start:end].tolist(), self._bits_of(sequence), size)
        return _Match(length, sequence, (start, end), (0, size)) if length else None

    def _in_item(self, document: I64, sequence: int) -> _Match | None:
        """The best stretch of the test sequence that has the document, if it is enough."""
        size = len(document)
        bits = positions(document.tolist())
        coded = self._index.coded[sequence].tolist()
        stretch = STEPS * step_of(size)
        best = (0, 0)
        for start in _starts(len(coded), stretch, step_of(size)):
            length = self._length(coded[start : start + stretch], bits, size)
            best = max(best, (length, -start))
        if not best[0]:
            return None
        piece = -best[1], min(-best[1] + stretch, len(coded))
        return _Match(best[0], sequence, (0, size), piece)

    def _length(self, longer: Sequence[int], bits: dict[int, int], size: int) -> int:
        """LCS of `longer` and the sequence of `size` tokens with these bits; 0 if not enough."""
        need = self._index.needs[size]
        matches = [bits[token] for token in longer if token in bits]
        length = length_of(matches, size) if len(matches) >= need else 0
        return length if length >= need else 0

    def _bits_of(self, sequence: int) -> dict[int, int]:
        if sequence not in self._bits:
            if len(self._bits) >= REMEMBERED:
                self._bits.clear()
            self._bits[sequence] = positions(self._index.coded[sequence].tolist())
        return self._bits[sequence]

    def _evidence(self, text: str, document: I64, matches: Sequence[_Match]) -> list[Hit]:
        in_text = self.stripped.spans(text) if matches else []
        return [self._hit(text, in_text, document, match) for match in matches]

    def _hit(self, text: str, in_text: Sequence[Span], document: I64, match: _Match) -> Hit:
        number, first = self._pieces[match.sequence]
        item = self.items[number]
        ours = document[slice(*match.document)].tolist()
        theirs = self._index.coded[match.sequence][slice(*match.piece)].tolist()
        pairs = lcs_pairs(theirs, ours)
        assert len(pairs) == match.length
        in_item = self.stripped.spans(item.text)
        words = [in_text[match.document[0] + j] for _, j in pairs]
        asked = [in_item[first + match.piece[0] + i] for i, _ in pairs]
        return Hit(
            test_set=item.test_set,
            item=item.id,
            length=match.length,
            share=match.length / min(len(ours), len(theirs)),
            document_tokens=len(ours),
            item_tokens=len(theirs),
            document_span=(words[0][0], words[-1][1]),
            item_span=(asked[0][0], asked[-1][1]),
            matched=_quote(text, words, in_text[slice(*match.document)]),
        )


def _quote(text: str, words: Sequence[Span], of: Sequence[Span]) -> str:
    """The words, with … where others stand between; `of`: those of the tokens of the stretch."""
    place = {word: i for i, word in enumerate(dict.fromkeys(of))}
    said: list[str] = []
    last = -1
    for word in dict.fromkeys(words):
        if said and place[word] != last + 1:
            said.append("…")
        said.append(text[slice(*word)])
        last = place[word]
    return " ".join(said)


def _starts(size: int, stretch: int, step: int) -> range:
    """Starts of stretches `step` apart, until one reaches the end."""
    return range(0, max(0, size - stretch) + step, step)


class NgramOverlap:
    """Any n-gram of stripped tokens that a text has in common with a test item."""

    def __init__(self, items: Iterable[EvalItem], encode: Encode, n: int = 13) -> None:
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

    def hits(self, text: str) -> Iterator[tuple[int, Span, Span]]:
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


def ngram_hashes(ids: I64, n: int) -> U64:
    """(max(0, len(ids) - n + 1),): a hash of each n-gram."""
    count = max(0, len(ids) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for k in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[k : k + count].astype(np.uint64)
        hashes ^= hashes >> np.uint64(29)
    return hashes
