"""MinHash signatures and their bands: which documents are near-duplicates of each other.

Report section 3.1 names deduplication without details; 14 bands of 8 rows over word 5-grams is what
FineWeb and others use. Two documents whose sets of 5-grams have Jaccard similarity s agree in one
number of a signature with probability s, and so share a band with probability 1 - (1 - s^8)^14:
0.08 at 0.5, 0.56 at 0.7, 0.92 at 0.8, 0.9998 at 0.9 (Broder 1997; Leskovec, Rajaraman and Ullman,
Mining of Massive Datasets, section 3.4).

The permutations are h -> a h + b modulo 2^32 with a odd, on n-gram hashes that are uniform in 32
bits. Each is a bijection, so a minimum is of the same n-gram in both documents with probability s;
that different permutations are as good as independent is measured by the tests.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from qwen2.common.config import Config
from qwen2.corpus.shingles import U64, mix, shingles

U32 = NDArray[np.uint32]
BLOCK = 1 << 16  # n-grams permuted together: 256 KB
EMPTY = np.uint32(0xFFFFFFFF)  # every number of the signature of a text without words


class MinHash(Config):
    """The family of hash functions. Signatures of different ones cannot be compared."""

    bands: int = Field(default=14, ge=1)
    rows: int = Field(default=8, ge=1)
    ngram: int = Field(default=5, ge=1)
    """Words of an n-gram; see shingles.py for scripts without spaces."""
    seed: int = 1

    @property
    def size(self) -> int:
        """Numbers of a signature: bands * rows."""
        return self.bands * self.rows

    def signatures(self, texts: Sequence[str]) -> U32:
        """(n, bands * rows). Each row depends on its text alone, whatever else is in `texts`.

        A text without words has a row of `EMPTY`. Memory beside the texts: about 12 bytes a word.
        """
        hashes, lengths = shingles(texts, self.ngram)
        return self._minima(hashes, lengths)

    def _minima(self, hashes: U32, lengths: NDArray[np.int64]) -> U32:
        least = np.full((len(lengths), self.size), EMPTY)
        ends = np.cumsum(lengths)
        some = np.flatnonzero(lengths)  # reduceat has no empty segments
        starts, ends = (ends - lengths)[some], ends[some]
        permuted = np.empty(min(BLOCK, len(hashes)), np.uint32)
        factors, terms = self._permutations()
        for low in range(0, len(hashes), BLOCK):
            block = hashes[low : low + BLOCK]
            first, last = np.searchsorted(ends, low, "right"), np.searchsorted(starts, low + BLOCK)
            cuts = np.maximum(starts[first:last] - low, 0)
            here = np.empty((self.size, len(cuts)), np.uint32)
            for i in range(self.size):
                values = permuted[: len(block)]
                np.multiply(block, factors[i], out=values)
                np.add(values, terms[i], out=values)
                np.minimum.reduceat(values, cuts, out=here[i])
            rows = some[first:last]
            least[rows] = np.minimum(least[rows], here.T)
        return least

    def _permutations(self) -> tuple[U32, U32]:
        """Factors and terms, `size` of each, from the seed by a fixed sequence of 64-bit mixes."""
        counter = np.arange(2 * self.size, dtype=np.uint64) + np.uint64(self.seed << 32)
        numbers = (mix(mix(counter)) >> np.uint64(32)).astype(np.uint32)
        return numbers[: self.size] | np.uint32(1), numbers[self.size :]

    def band_keys(self, signatures: U32) -> U64:
        """(n, bands): equal where all rows of the band are, and else with probability 2^-64."""
        numbers = signatures.astype(np.uint64).reshape(len(signatures), self.bands, self.rows)
        keys = np.zeros((len(signatures), self.bands), np.uint64)
        for row in range(self.rows):
            keys = mix(keys + numbers[:, :, row] + np.uint64(1))
        return keys

    def probability(self, jaccard: float) -> float:
        """That two documents of this similarity share a band."""
        return 1 - (1 - jaccard**self.rows) ** self.bands


def has_words(signatures: U32) -> NDArray[np.bool_]:
    """(n,): whether the text had a word."""
    return (signatures != EMPTY).any(axis=1)


def similarity(a: U32, b: U32) -> NDArray[np.float64]:
    """Estimated Jaccard similarity, row by row: the share of equal numbers.

    Its standard error is sqrt(s (1 - s) / size): 0.047 at most for 112 numbers.
    """
    return (a == b).mean(axis=1)
