"""Hashed words and pairs of words of many texts at once: what the linear classifier looks at.

Works on bytes of UTF-8, a batch at a time, in numpy; no word is ever a Python object. The words of
`corpus/filters/words.py` follow the published rules of counting, which takes a dozen tables a
character; a classifier learns its weights from whatever tokens it is given, so these are cut by the
byte alone, which is several times faster:

- Letters and digits of ASCII and letters of two bytes (Latin, Greek, Cyrillic, Hebrew, Arabic) make
  words; so do Latin and Greek letters of three bytes (Vietnamese).
- Any other sign is a token: punctuation, line ends, and each letter of three or four bytes (Han,
  kana, Hangul, Thai ...), whose pairs are what words are elsewhere.
- Spaces and tabs part tokens. Case is kept: CAPITALS tell of quality.

The hash of a token is a polynomial over its bytes modulo 2^64, taken from a running sum over the
batch, so that its cost does not depend on where words begin.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen2.corpus.filters.words import GOLDEN, MIX_1, Hashes, batches

Bytes = NDArray[np.uint8]
Slots = NDArray[np.int64]

BATCH_CHARACTERS = 1 << 16
"""Arrays of a batch stay in the processor's second cache."""
SPACE, LETTER, OTHER, CONTINUED = range(4)
# An odd base, whose powers modulo 2^64 differ for 2^62 places, and its inverse.
BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 1 << 64)
PAIR = np.uint64(0xD6E8FEB86659FD93)


@dataclass(frozen=True)
class Features:
    """Slots of the tokens and pairs of a batch of texts, flat."""

    slots: Slots
    """Tokens of all texts, and behind them pairs."""
    tokens: Slots
    """Tokens before each text, and at last their number: (texts + 1,)."""
    pairs: Slots
    """The same of pairs: one fewer in each text than tokens, or none."""

    @property
    def counts(self) -> Slots:
        """Features of each text, (texts,)."""
        return np.diff(self.tokens) + np.diff(self.pairs)

    def of_text(self, index: int) -> Slots:
        """The slots of one text, with repetitions."""
        first, last = self.pairs[index : index + 2] + self.tokens[-1]
        return np.concatenate(
            [self.slots[self.tokens[index] : self.tokens[index + 1]], self.slots[first:last]]
        )


def feature_batches(texts: Sequence[str], bits: int) -> Iterator[tuple[slice, Features]]:
    """The features of `texts`, with slots below 2^bits, some texts at a time."""
    for part in batches(texts, BATCH_CHARACTERS):
        yield part, features(texts[part], bits)


def features(texts: Sequence[str], bits: int) -> Features:
    """The features of `texts` at once. Memory: about 60 bytes a byte; see `feature_batches`."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    data = np.frombuffer(b" ".join([*encoded, b""]), np.uint8)
    sizes = np.array([len(each) + 1 for each in encoded], np.int64)
    starts, ends = _tokens(data)
    hashes = _hashes(data, starts, ends)
    tokens = np.searchsorted(starts, np.concatenate([[0], np.cumsum(sizes)]))
    pairs = (hashes[:-1] * PAIR + hashes[1:]) * GOLDEN
    inner = np.ones(len(pairs), np.bool_)
    seams = tokens[1:-1]
    inner[seams[(seams > 0) & (seams < len(hashes))] - 1] = False
    shift = np.uint64(64 - bits)
    slots = (np.concatenate([hashes, pairs[inner]]) >> shift).astype(np.int64)
    counts = np.maximum(np.diff(tokens) - 1, 0)
    return Features(slots, tokens, np.concatenate([[0], np.cumsum(counts)]))


def _tokens(data: Bytes) -> tuple[Slots, Slots]:
    """First byte of each token, and one past its last; `data` ends with a space."""
    kinds = _kinds()[data]
    letters, begins = kinds == LETTER, kinds == OTHER
    if data.max(initial=0) >= 0x80:
        long = np.flatnonzero(data[:-1] == 0xE1)
        long = long[(data[long + 1] >= 0xB8) & (data[long + 1] <= 0xBF)]  # U+1E00 to U+1FFF
        letters[long], begins[long] = True, False
        continued = kinds == CONTINUED
        for _ in range(2):  # bytes of a letter that makes words, behind its first
            letters[1:] |= continued[1:] & letters[:-1]
    begins[1:] |= letters[1:] & ~letters[:-1]
    begins[:1] |= letters[:1]
    # A token ends where the next begins or at a space, whichever comes first.
    stops = np.flatnonzero(begins | (kinds == SPACE))
    at = np.flatnonzero(begins[stops])
    return stops[at], stops[at + 1]


def _hashes(data: Bytes, starts: Slots, ends: Slots) -> Hashes:
    """64 bits of each token, the same in any batch and at any place."""
    powers, inverses = _powers(1 << len(data).bit_length())
    sums = np.empty(len(data) + 1, np.uint64)
    sums[0] = 0
    np.cumsum(powers[: len(data)] * data, out=sums[1:])
    hashes = (sums[ends] - sums[starts]) * inverses[starts]
    hashes ^= hashes >> np.uint64(32)
    return hashes * MIX_1


@functools.cache
def _kinds() -> Bytes:
    kinds = np.full(256, OTHER, np.uint8)
    kinds[[ord(c) for c in " \t\r\0"]] = SPACE
    kinds[[i for i in range(128) if chr(i).isalnum()]] = LETTER
    kinds[0x80:0xC0] = CONTINUED
    kinds[0xC3:0xE0] = LETTER  # C2: signs of Latin-1
    return kinds


@functools.lru_cache(maxsize=4)
def _powers(count: int) -> tuple[Hashes, Hashes]:
    """BASE^i and BASE^-i modulo 2^64 for i below `count`."""
    tables = []
    for base in (BASE, INVERSE):
        steps = np.full(count, base, np.uint64)
        steps[0] = 1
        tables.append(np.multiply.accumulate(steps))
        tables[-1].setflags(write=False)
    return tables[0], tables[1]
