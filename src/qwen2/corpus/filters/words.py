"""Words of many texts at once: where they stand, what they are made of, hashes of them.

The unit of every rule that counts words. One pass of numpy over the code points of a batch; no
word is ever a Python object. Words are cut as tools that the published thresholds were used with
cut them (datatrove, by spaCy's rules): at white space, with punctuation at their ends, contractions
("do" "n't"), hyphens and a few signs between letters as tokens of their own. Deviations, all rare:
no list of abbreviations, no units after numbers ("10km" is one word), and a URL is known by
its "://".

Scripts without spaces (Han, kana, Thai, Lao, Khmer, Myanmar, Tibetan) have no words that could be
found without a dictionary: there a token is one letter with its marks, and weighs half a word (Han
and kana, where words have 1.5 to 2.2 letters) or a third of one (the others). Counts of words are
sums of these weights, so that one threshold serves all scripts; `scales` says how many tokens a
text needs for a word of an n-gram. Both look at the letters, not at a label that may be wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2.corpus.filters import characters as ch

Flags = NDArray[np.bool_]
Indices = NDArray[np.int64]
Hashes = NDArray[np.uint64]

BATCH_CHARACTERS = 1 << 19
"""Temporary arrays stay in the processor's cache, more or less, and out of the allocator's way."""
WIDE_LETTERS, OTHER_LETTERS = 2, 3
"""Letters to a word in Han and kana, and in the other scripts without spaces."""
# Odd constants of splitmix64 (Steele, Lea, Flood 2014).
GOLDEN, MIX_1, MIX_2 = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)


@dataclass(frozen=True)
class Words:
    """Words of a batch of texts, flat: `firsts[i]:firsts[i + 1]` are those of text i."""

    starts: Indices
    """First character of each word, counted in `codes`."""
    ends: Indices
    """One past its last character."""
    firsts: Indices
    """Words before each text, and at last their number: (texts + 1,)."""
    bits: ch.Bits
    """Union of the bits of a word's characters."""
    hashes: Hashes
    """64 bits of each word, the same in any batch."""
    codes: ch.Codes
    """Code points of all texts, one line feed between two."""
    flags: ch.Bits
    """Bits of each code point."""
    offsets: Indices
    """First character of each text in `codes`, and one past the last line feed: (texts + 1,)."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> Indices:
        """Characters of each word."""
        return self.ends - self.starts

    @property
    def counts(self) -> Indices:
        """Words of each text."""
        return np.diff(self.firsts)

    @property
    def texts(self) -> Indices:
        """The text that each word belongs to."""
        return np.repeat(np.arange(len(self.firsts) - 1), self.counts)

    @functools.cached_property
    def weights(self) -> NDArray[np.float64]:
        """Words that each token counts for: 1, or 1/2 or 1/3 of a letter without spaces."""
        weights = np.ones(len(self))
        unspaced = (self.bits & ch.UNSPACED) != 0
        if unspaced.any():
            wide = (self.bits[unspaced] & ch.WIDE) != 0
            weights[unspaced] = np.where(wide, 1 / WIDE_LETTERS, 1 / OTHER_LETTERS)
        return weights

    @functools.cached_property
    def scales(self) -> Indices:
        """Tokens to a word of an n-gram in each text, (texts,): 1 where most have spaces."""
        unspaced = self.per_text((self.bits & ch.UNSPACED) != 0)
        wide = self.per_text((self.bits & ch.WIDE) != 0)
        letters = np.where(2 * wide >= unspaced, WIDE_LETTERS, OTHER_LETTERS)
        return np.where(2 * unspaced > self.counts, letters, 1)

    def per_text(self, values: NDArray[np.generic]) -> NDArray[Any]:
        """Sum over the words of each text, (texts,)."""
        return segment_sums(values, self.firsts)


def segment_sums(values: NDArray[Any], bounds: Indices) -> NDArray[Any]:
    """Sums of `values[bounds[i]:bounds[i + 1]]`, where a segment may be empty.

    Each segment is summed on its own: its sum doesn't depend on what stands before it.
    """
    kind = np.float64 if values.dtype == np.float64 else np.int64
    sums = np.zeros(len(bounds) - 1, kind)
    filled = bounds[1:] > bounds[:-1]
    if filled.any():
        sums[filled] = np.add.reduceat(values, bounds[:-1][filled], dtype=kind)
    return sums


def batches(texts: Sequence[str], limit: int = BATCH_CHARACTERS) -> Iterator[slice]:
    """Slices of `texts` of about `limit` characters; every text is whole."""
    start = size = 0
    for index, text in enumerate(texts):
        if size and size + len(text) > limit:
            yield slice(start, index)
            start, size = index, 0
        size += len(text) + 1
    if start < len(texts):
        yield slice(start, len(texts))


def split(texts: Sequence[str]) -> Words:
    """Words of `texts`. Memory: about 40 bytes a character; see `batches`."""
    codes = ch.codes("\n".join(texts) + "\n" if texts else "")
    flags = ch.table()[codes]
    offsets = np.zeros(len(texts) + 1, np.int64)
    np.cumsum([len(text) + 1 for text in texts], out=offsets[1:])

    space = (flags & ch.SPACE) != 0
    begins = _boundaries(codes, flags, space)
    begins &= ~space
    starts = np.flatnonzero(begins)
    # A word ends where the next begins or at white space, whichever comes first.
    stops = np.flatnonzero(begins | (space & _previous(~space, False)))
    ends = stops[np.searchsorted(stops, starts) + 1] if len(starts) else starts
    bits = np.bitwise_or.reduceat(flags, starts) if len(starts) else flags[:0]
    firsts = np.searchsorted(starts, offsets)
    return Words(
        starts, ends, firsts, bits, _hashes(codes, space, starts, ends), codes, flags, offsets
    )


def hash_of(word: str) -> int:
    """The hash that `split` gives the one word `word`."""
    words = split([word])
    assert len(words) == 1, f"{word!r} is not one word"
    return int(words.hashes[0])


def mix(values: Hashes) -> Hashes:
    """splitmix64's finaliser: every bit of the argument changes half of the result's."""
    values = (values ^ (values >> np.uint64(30))) * MIX_1
    values = (values ^ (values >> np.uint64(27))) * MIX_2
    return values ^ (values >> np.uint64(31))


def _hashes(codes: ch.Codes, space: Flags, starts: Indices, ends: Indices) -> Hashes:
    """Multilinear hash (Lemire and Kaser 2014): a sum of code points, each times a random number
    of its position in the word; then mixed with the length."""
    if not len(starts):
        return np.zeros(0, np.uint64)
    lengths = ends - starts
    gaps = np.diff(starts, append=len(codes))  # with the white space that follows
    positions = np.arange(starts[0], len(codes)) - np.repeat(starts, gaps)
    products = _multipliers(1 << int(gaps.max()).bit_length())[positions]
    products *= codes[starts[0] :]
    products[space[starts[0] :]] = 0
    return mix(np.add.reduceat(products, starts - starts[0]) + lengths.astype(np.uint64) * GOLDEN)


@functools.lru_cache(maxsize=4)
def _multipliers(count: int) -> Hashes:
    values = mix(np.arange(1, count + 1, dtype=np.uint64) * GOLDEN) | np.uint64(1)
    values.setflags(write=False)
    return values


def _previous(values: Flags, first: bool) -> Flags:
    """The value one place before."""
    shifted = np.empty_like(values)
    shifted[1:] = values[:-1]
    shifted[:1] = first
    return shifted


def _next(values: Flags, last: bool) -> Flags:
    """The value one place behind."""
    shifted = np.empty_like(values)
    shifted[:-1] = values[1:]
    shifted[-1:] = last
    return shifted


def _boundaries(codes: ch.Codes, flags: ch.Bits, space: Flags) -> Flags:
    """Where a token begins, white space apart."""
    before = _previous(space, True)
    begins = before | _unspaced(flags)

    edge = (flags & ch.EDGE) != 0
    dot = codes == ord(".")
    alone = (flags & ch.ALONE) != 0
    ellipsis = dot & (_previous(dot, False) | _next(dot, False))
    opening = _runs(edge | ellipsis | alone | ((flags & ch.OPENER) != 0), space)[0]
    closing = _runs(edge | ellipsis | alone | _closers(codes, flags, edge, dot), space)[1]
    single = alone | opening | closing | ellipsis
    begins |= single | _previous(single, False)
    begins &= ~(ellipsis & _previous(ellipsis, False))  # dots stay together
    ends = space | closing
    begins |= _contractions(codes, flags, ends)
    infix = _infixes(codes, flags, dot)
    if infix.any():
        infix &= ~_in_urls(codes, flags, space, opening)
    return begins | infix | _previous(infix, False)


def _any(codes: ch.Codes, characters: str) -> Flags:
    """Where one of `characters` stands."""
    return np.logical_or.reduce([codes == ord(c) for c in characters])


def _unspaced(flags: ch.Bits) -> Flags:
    """Beginnings in scripts without spaces: each letter, and what follows one but is no mark."""
    letter = (flags & ch.UNSPACED) != 0
    if not letter.any():
        return letter
    mark = (flags & ch.MARK) != 0
    # A letter's marks go along with it: what stands behind them is behind the letter.
    index = np.arange(len(flags))
    base = np.maximum.accumulate(np.where(mark, 0, index))
    return letter | (_previous(letter[base], False) & ~mark)


def _closers(codes: ch.Codes, flags: ch.Bits, edge: Flags, dot: Flags) -> Flags:
    """What is a token of its own at the end of a word only, for what stands before it."""
    digit_before = _previous((flags & ch.DIGIT) != 0, False)
    dash = (codes == ord("–")) | (codes == ord("—"))
    amount = digit_before & ((flags & ch.OPENER) != 0) & (codes != ord("="))
    lower = (flags & (ch.LOWER | ch.DIGIT | ch.MARK | ch.UNSPACED)) != 0
    caseless = (flags & (ch.ALPHA | ch.UPPER | ch.LOWER)) == ch.ALPHA
    upper = (flags & ch.UPPER) != 0
    stops = lower | caseless | edge | _any(codes, "%²-+")
    stops |= upper & _previous(upper, False)
    # "e.g.", "b." and initials: a letter that stands alone keeps its dot.
    alpha = (flags & ch.ALPHA) != 0
    stops &= ~(alpha & _previous((flags & ch.CONTENT) == 0, True)) | caseless
    return dash | amount | (dot & _previous(stops, False))


def _runs(members: Flags, space: Flags) -> tuple[Flags, Flags]:
    """Members of the runs that begin a word, and of those that end one."""
    starts = np.flatnonzero(members & ~_previous(members, False))
    ends = np.flatnonzero(members & ~_next(members, False)) + 1
    lengths = ends - starts
    opens = np.where(starts == 0, True, space[starts - 1])
    closes = np.where(ends == len(space), True, space[np.minimum(ends, len(space) - 1)])
    opening, closing = np.zeros_like(members), np.zeros_like(members)
    opening[members] = np.repeat(opens, lengths)
    closing[members] = np.repeat(closes, lengths)
    return opening, closing


def _contractions(codes: ch.Codes, flags: ch.Bits, ends: Flags) -> Flags:
    """Beginnings of 's, 'm, 'd, 'll, 're, 've and n't at the end of a word."""
    at = np.flatnonzero((codes == ord("'")) | (codes == ord("’")))
    begins = np.zeros(len(codes), np.bool_)
    at = at[(at > 0) & (at < len(codes) - 2)]
    alpha_before = (flags[at - 1] & ch.ALPHA) != 0
    one, two = codes[at + 1] | 32, codes[at + 2] | 32  # in lower case
    end_of_one, end_of_two = ends[at + 2], ends[np.minimum(at + 3, len(codes) - 1)]
    short = end_of_one & np.isin(one, [ord(c) for c in "smd"])
    pairs = [(ord(a), ord(b)) for a, b in ("ll", "re", "ve")]
    long = end_of_two & np.logical_or.reduce([(one == a) & (two == b) for a, b in pairs])
    begins[at[alpha_before & (short | long)]] = True
    negated = end_of_one & (one == ord("t")) & ((codes[at - 1] | 32) == ord("n"))
    before = at[negated] - 1
    begins[before[(before > 0) & ((flags[np.maximum(before - 1, 0)] & ch.ALPHA) != 0)]] = True
    return begins


def _infixes(codes: ch.Codes, flags: ch.Bits, dot: Flags) -> Flags:
    """Signs that part what stands on both sides of them."""
    alpha = (flags & ch.ALPHA) != 0
    digit = (flags & ch.DIGIT) != 0
    alpha_before, alpha_after = _previous(alpha, False), _next(alpha, False)
    known_before = alpha_before | _previous(digit, False)
    signs = _any(codes, ":<>=/") | ((flags & ch.HYPHEN) != 0)
    between = alpha_after & ((signs & known_before) | ((codes == ord(",")) & alpha_before))
    between |= (
        dot & _previous((flags & ch.LOWER) != 0, False) & _next((flags & ch.UPPER) != 0, False)
    )
    minus = codes == ord("-")
    sums = _any(codes, "+-*^")
    return between | (sums & _previous(digit, False) & _next(digit | minus, False))


def _in_urls(codes: ch.Codes, flags: ch.Bits, space: Flags, opening: Flags) -> Flags:
    """Characters of words that begin with letters and "://"."""
    inside = np.zeros(len(codes), np.bool_)
    marks = np.flatnonzero(codes[:-2] == ord(":"))
    marks = marks[(codes[marks + 1] == ord("/")) & (codes[marks + 2] == ord("/"))]
    if not len(marks):
        return inside
    other = np.flatnonzero((flags & ch.ALPHA) == 0)
    before = other[np.searchsorted(other, marks) - 1]
    marks = marks[space[before] | opening[before] | (before >= marks)]
    spaces = np.flatnonzero(space)
    ends = spaces[np.searchsorted(spaces, marks)]
    steps = np.zeros(len(codes) + 1, np.int8)
    np.add.at(steps, marks, 1)
    np.add.at(steps, ends, -1)
    return np.cumsum(steps[:-1], dtype=np.int8) > 0
