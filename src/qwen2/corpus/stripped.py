"""Token ids of a text without its symbols and punctuation, and where they are in the text.

Report section 5.2.6 compares sequences so. A word is a run of letters, digits and marks; case is
folded and the text is in NFC, so that a copy in capitals or in the other Unicode form is still a
copy (the report does not say whether it does this). Each word is tokenised by itself, as if a space
came before it: byte-level BPE never merges over spaces, so these are the ids of the stripped text
with its words one space apart, and words that come again cost a look-up.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Encode = Callable[[str], Sequence[int]]
REMEMBERED = 1 << 20  # words whose ids are kept
LONGEST_REMEMBERED = 40  # characters; longer ones, of scripts without spaces, hardly come again
BEYOND = (  # letters beyond 16 bits by block: hundreds of exact ranges make matching 4 times slower
    (0x10000, 0x1CFFF), (0x1D400, 0x1D7FF), (0x1DF00, 0x1EEEF), (0x20000, 0x3FFFF),
)  # fmt: skip


class Stripped:
    """The stripped tokens of texts; `encode` gives the ids of a string."""

    def __init__(self, encode: Encode) -> None:
        self._words = _Words(encode)

    def ids(self, text: str) -> NDArray[np.int64]:
        """(n,): the token ids."""
        if len(self._words) > REMEMBERED:
            self._words.clear()
        of_words = [self._words[word] for word in _pattern().findall(text)]
        return np.fromiter(itertools.chain.from_iterable(of_words), np.int64)

    def spans(self, text: str) -> list[tuple[int, int]]:
        """Of each token, start and end of its word in `text`."""
        found = []
        for match in _pattern().finditer(text):
            found += [match.span()] * len(self._words[match.group()])
        return found


class _Words(dict[str, tuple[int, ...]]):
    def __init__(self, encode: Encode) -> None:
        super().__init__()
        self.encode = encode

    def __missing__(self, word: str) -> tuple[int, ...]:
        visible = "".join(x for x in word.casefold() if unicodedata.category(x) != "Cf")
        # A digit after a space would make the space a token of its own.
        space = " " if visible[:1].isalpha() else ""
        ids = tuple(self.encode(space + unicodedata.normalize("NFC", visible)))
        if len(word) <= LONGEST_REMEMBERED:
            self[word] = ids
        return ids


@functools.cache
def _pattern() -> re.Pattern[str]:
    """Runs of letters, marks and digits, and format characters (soft hyphens) inside them."""
    ranges: list[list[int]] = []
    for point in range(0x10000):
        category = unicodedata.category(chr(point))
        if category[0] in "LMN" or category == "Cf":
            if ranges and ranges[-1][1] == point - 1:
                ranges[-1][1] = point
            else:
                ranges.append([point, point])
    inside = "".join(f"{chr(a)}-{chr(b)}" for a, b in [*ranges, *BEYOND])
    return re.compile(f"[{inside}]+")
