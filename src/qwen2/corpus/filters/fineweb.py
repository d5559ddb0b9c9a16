"""FineWeb's own statistics (Penedo et al. 2024, section 3.6), and its list rule.

Over the lines (by line feeds) that are not blank:
- `punctuated_lines`: share that ends with terminal punctuation of any script.
- `short_lines`: share of at most 30 characters; in scripts without spaces, where a word takes fewer
  characters, at most 12 (Han, kana) or 22 (others).
- `repeated_line_characters`: characters of lines that occurred before, over those of the text
  without line feeds.
- `line_feeds_per_word`: of all line feeds; with datatrove's name, the list ratio.

A text without such lines has 0 for all; it fails `punctuated_lines`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen2.corpus.filters import characters as ch
from qwen2.corpus.filters.words import OTHER_LETTERS, WIDE_LETTERS, Words

STATISTICS = (
    "punctuated_lines",
    "short_lines",
    "repeated_line_characters",
    "line_feeds_per_word",
)
SHORT_LINE = {1: 30, WIDE_LETTERS: 12, OTHER_LETTERS: 22}
"""Characters by `Words.scales`: what 5.3 words take; English has 5.7 with the space."""
Numbers = NDArray[np.float64]


def measure(texts: Sequence[str], words: Words) -> dict[str, Numbers]:
    """The statistics of each text, (texts,) each, from the `words` of the same texts."""
    ending = ch.terminals()
    numbers = np.zeros((len(STATISTICS), len(texts)))
    weights = words.per_text(words.weights)
    for index, (text, scale) in enumerate(zip(texts, words.scales.tolist(), strict=True)):
        lines = [line for line in text.split("\n") if line and not line.isspace()]
        feeds = text.count("\n")
        if lines:
            sizes = list(map(len, lines))
            unique = set(lines)
            numbers[0, index] = sum(line[-1] in ending for line in lines) / len(lines)
            short = SHORT_LINE[scale]
            numbers[1, index] = sum(size <= short for size in sizes) / len(lines)
            if len(unique) < len(lines):
                again = sum(sizes) - sum(map(len, unique))
                numbers[2, index] = again / (len(text) - feeds)
            numbers[3, index] = feeds / weights[index] if weights[index] else 0.0
    return dict(zip(STATISTICS, numbers, strict=True))
