"""Long documents more often: a source whose epochs have a given share of long text.

Report section 3.2: in the last phase of pre-training much more long data. Short documents stay,
each once, lest the model forget them; long ones come as many whole times as it takes, and a fixed
draw of them once more. Nothing is dropped and nothing is cut here: packing cuts what is longer than
the context into pieces (packing.py).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2.tokens.loader import TokenSource


class LongMixture:
    """Documents of `source`, those of `long_tokens` and more repeated up to `long_share`.

    The share is that of an epoch's tokens; it is reached and passed by less than one document.
    Where there is no long document, or their share is reached already, all stays as it is.
    """

    def __init__(self, source: TokenSource, long_tokens: int, long_share: float) -> None:
        assert 0 < long_share < 1, long_share
        lengths = source.lengths
        long = np.flatnonzero(lengths >= long_tokens)
        counts = np.ones(len(lengths), np.int64)
        self.long_documents = len(long)
        self.own_tokens = int(lengths[long].sum())
        short_tokens = int(lengths.sum()) - self.own_tokens
        wanted = math.ceil(short_tokens * long_share / (1 - long_share))
        counts[long] = copies(lengths[long], wanted)
        self._source = source
        self._numbers = np.repeat(np.arange(len(lengths)), counts)
        self.lengths: NDArray[np.int64] = lengths[self._numbers]
        self.long_tokens = int((lengths * counts)[long].sum())
        self.tokens = short_tokens + self.long_tokens
        self.fingerprint = f"{source.fingerprint} long {long_tokens} share {long_share}"

    def document(self, number: int, /) -> NDArray[Any]:
        """(length,) token ids of a document."""
        return self._source.document(int(self._numbers[number]))

    def beneath(self, number: int) -> tuple[TokenSource, int]:
        """The source that a document is of, and its number there."""
        return self._source, int(self._numbers[number])

    @property
    def long_share(self) -> float:
        """The share that long documents have of an epoch's tokens."""
        return self.long_tokens / self.tokens

    @property
    def repeats(self) -> float:
        """How often an epoch has a token of a long document, on average; 1: it is as it was."""
        return self.long_tokens / self.own_tokens if self.own_tokens else 1.0


def copies(lengths: NDArray[np.int64], wanted: int) -> NDArray[np.int64]:
    """How often each of some documents must come to make up `wanted` tokens together.

    Every one comes as often as all fit in whole, at least once, and the first of a fixed shuffle
    once more: the sum is at least `wanted`, and less without the last of these.
    """
    total = int(lengths.sum())
    if total == 0 or wanted <= total:
        return np.ones(len(lengths), np.int64)
    whole, rest = divmod(wanted, total)
    counts = np.full(len(lengths), whole, np.int64)
    if rest:
        # The raw stream, as in packing.py: the same in every version of numpy.
        order = np.argsort(np.random.PCG64(0).random_raw(len(lengths)), kind="stable")
        last = int(np.searchsorted(np.cumsum(lengths[order]), rest))
        counts[order[: last + 1]] += 1
    return counts
