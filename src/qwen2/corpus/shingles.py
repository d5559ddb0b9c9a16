"""Word n-grams of a text as hashes, in one numpy pass over its characters.

What counts as a word, so that one rule serves text of any language and mixtures of them:

- Letters and digits make words, everything else parts them. Case and accents are folded (the base
  letter of the compatibility decomposition), and marks that canonical reordering may move and
  format characters are passed over, so NFC and NFD, soft hyphens and full-width letters make no
  difference (conjoining Hangul jamo excepted).
- Scripts that are written without spaces (Han, Hiragana, Katakana, Thai, Lao, Khmer, Myanmar, Tai)
  have no words to see: there each letter, with the vowel signs that follow it, is a word of its
  own, and word n-grams are character n-grams.

A word's hash is its polynomial modulo 2^64 with an odd base, taken over the whole block at once and
brought to its own start by the inverse power; then mixed. It depends on the word alone, never on
what else is in the block.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
BLOCK = 1 << 18  # characters that are hashed together: their powers stay in the second-level cache
BASE = 0x9E3779B97F4A7C15
GRAM_BASE = 0xD1342543DE82EF95
SEPARATOR, WORD, ALONE, FOLLOWS, PASSED = range(5)  # classes of characters
UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F), (0xA9E0, 0xA9FF), (0xAA60, 0xAA7F),  # Myanmar
    (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF),  # Khmer, Tai
    (0x3005, 0x3007), (0x3040, 0x312F), (0x31A0, 0x31BF), (0x31F0, 0x31FF),  # kana, Bopomofo
    (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x323AF),  # Han
)  # fmt: skip
HAN_OR_HANGUL = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x20000, 0x323AF))
OTHERS = (
    (0, 0x3400), (0x4DC0, 0x4E00), (0xA000, 0xAC00), (0xD7B0, 0xD800), (0xF900, 0x20000),
    (0xE0000, 0xE0200),
)  # fmt: skip
VARIATION_SELECTORS = ((0xFE00, 0xFE0F), (0xE0100, 0xE01EF))


def word_hashes(texts: Sequence[str]) -> tuple[U64, NDArray[np.int64]]:
    """The words of all texts, text after text, as hashes (W,), and how many each text has (n,)."""
    hashes: list[U64] = [np.empty(0, np.uint64)]
    counts = np.zeros(len(texts), np.int64)
    for first, last in _blocks(texts):
        if last - first > 1 or len(texts[first]) <= BLOCK:
            part, counts[first:last] = _hash_together(texts[first:last])
            hashes.append(part)
        else:
            for part in _hash_long(texts[first]):
                hashes.append(part)
                counts[first] += len(part)
    return np.concatenate(hashes), counts


def shingles(texts: Sequence[str], n: int) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Hashes of the word n-grams of each text, text after text, and how many each has.

    A text of fewer than n words, but one at least, has a single n-gram: all of it.
    """
    words, counts = word_hashes(texts)
    ends = np.cumsum(counts)
    padded = np.concatenate([words, np.zeros(n - 1, np.uint64)])
    factors = [np.uint64(pow(GRAM_BASE, k, 1 << 64)) for k in range(n)]
    grams = np.zeros(len(words), np.uint64)
    for k in range(n):
        grams += padded[k : k + len(words)] * factors[k]
    for i in np.flatnonzero((counts > 0) & (counts < n)):
        short = words[ends[i] - counts[i] : ends[i]]
        grams[ends[i] - counts[i]] = (short * np.array(factors[: len(short)])).sum()
    kept = np.ones(len(words), bool)
    for k in range(1, n):  # the last n - 1 words of a text begin no n-gram of it
        kept[ends[counts > k] - k] = False
    lengths = np.where(counts >= n, counts - n + 1, np.minimum(counts, 1))
    return (mix(grams[kept]) >> np.uint64(32)).astype(np.uint32), lengths


def mix(x: U64) -> U64:
    """A bijection of 64-bit numbers that lets each bit change all (Stafford's mix 13)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _blocks(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Ranges of texts that have at most BLOCK characters with a separator each, or are one text."""
    first = size = 0
    for i, text in enumerate(texts):
        if size and size + len(text) + 1 > BLOCK:
            yield first, i
            first, size = i, 0
        size += len(text) + 1
    if size:
        yield first, len(texts)


def _hash_together(texts: Sequence[str]) -> tuple[U64, NDArray[np.int64]]:
    hashes, starts, _ = _hash_block("\n".join(texts))
    ends = np.cumsum([len(text) + 1 for text in texts])
    return hashes, np.diff(np.searchsorted(starts, ends), prepend=0)


def _hash_long(text: str) -> Iterator[U64]:
    """The words of a text beyond BLOCK, in pieces that end where a word does.

    Only a word longer than a block is cut.
    """
    at = 0
    while at < len(text):
        hashes, starts, length = _hash_block(text[at : at + BLOCK])
        if at + BLOCK < len(text) and len(starts) and starts[-1] > 0:
            hashes, length = hashes[:-1], int(starts[-1])
        yield hashes
        at += length


def _hash_block(text: str) -> tuple[U64, NDArray[np.int64], int]:
    """Hashes of the words of `text`, where each starts, and the length of the text."""
    folded, classes = _fold(text)
    places: NDArray[np.int64] | None = None
    if text.isascii():
        begins = classes.copy()
        begins[1:] &= ~classes[:-1]
        starts = np.flatnonzero(begins)
    else:
        passed = classes == PASSED
        if passed.any():
            places = np.flatnonzero(~passed)
            folded, classes = folded[places], classes[places]
        before = np.concatenate([np.zeros(1, np.uint8), classes[:-1]])
        starts = np.flatnonzero(
            (classes == ALONE)
            | ((classes == WORD) & (before != WORD))
            | ((classes == FOLLOWS) & (before < ALONE))
        )
    if not len(starts):
        return np.empty(0, np.uint64), np.empty(0, np.int64), len(text)
    powers, inverses = _powers()
    # Separators are folded to 0, so a sum may run on to the start of the next word.
    sums = np.add.reduceat(folded * powers[: len(folded)], starts)
    hashes = mix(sums * inverses[starts])
    return hashes, starts if places is None else places[starts], len(text)


def _fold(text: str) -> tuple[NDArray[np.uint8] | NDArray[np.uint32], NDArray[np.uint8]]:
    """Folded characters, 0 for those outside words, and the class of each."""
    fold, classes = _tables()
    if text.isascii():
        ascii_ = text.encode("ascii")
        folded = ascii_.translate(fold[:256].astype(np.uint8).tobytes())
        kinds = ascii_.translate(classes[:256].tobytes())
        return np.frombuffer(folded, np.uint8), np.frombuffer(kinds, np.uint8)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.intp)
    return fold[points], classes[points]


@functools.cache
def _powers() -> tuple[U64, U64]:
    """BASE^i and BASE^-i modulo 2^64 for i < BLOCK."""
    powers, inverses = (
        np.cumprod(np.concatenate([[np.uint64(1)], np.full(BLOCK - 1, base, np.uint64)]))
        for base in (BASE, pow(BASE, -1, 1 << 64))
    )
    return powers, inverses


@functools.cache
def _tables() -> tuple[NDArray[np.uint32], NDArray[np.uint8]]:
    """What each code point is folded to, and its class."""
    fold = np.zeros(0x110000, np.uint32)
    classes = np.zeros(0x110000, np.uint8)
    unspaced = np.zeros(0x110000, bool)
    for low, high in UNSPACED:
        unspaced[low : high + 1] = True
    for low, high in HAN_OR_HANGUL:
        fold[low : high + 1] = np.arange(low, high + 1)
        classes[low : high + 1] = np.where(unspaced[low : high + 1], ALONE, WORD)
    for point in itertools.chain.from_iterable(itertools.starmap(range, OTHERS)):
        character = chr(point)
        major = unicodedata.category(character)
        selector = any(low <= point <= high for low, high in VARIATION_SELECTORS)
        if major == "Cf" or selector or (major[0] == "M" and unicodedata.combining(character)):
            classes[point] = PASSED
        elif major[0] == "M":  # vowel signs
            fold[point] = point
            classes[point] = FOLLOWS if unspaced[point] else WORD
        elif major[0] in "LN":
            fold[point] = ord(_base_letter(character))
            classes[point] = ALONE if unspaced[fold[point]] else WORD
    return fold, classes


def _base_letter(character: str) -> str:
    """Without accents, compatibility forms and case, where that leaves one letter."""
    for form in (unicodedata.normalize("NFKD", character), character):
        letters = [x for x in form if not unicodedata.combining(x)]
        folded = "".join(letters).casefold()
        if len(folded) == 1 and folded.isalnum():
            return folded
    return character
