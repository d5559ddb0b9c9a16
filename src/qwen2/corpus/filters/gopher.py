"""Gopher's quality statistics (Rae et al. 2021, A.1.1).

- `words`: those that are not only signs. `mean_word_length`: their characters.
- `hashes_per_word`, `ellipses_per_word`: of "#", and of "..." or "…", per token.
- `bullet_lines`, `ellipsis_lines`: share of lines that begin with "•" or "-", or end with
  "..." or "…".
- `alphabetic_words`: share of tokens with at least one letter, of any script.
- `stop_words`: how many different ones of the language's list occur; 0 for one without a
  list, and the rule then has no limit.

Tokens, not words between spaces, are counted, punctuation among them: so does datatrove, which the
thresholds in use were chosen with; the paper does not say. In scripts without spaces a letter
counts for a half or a third of a word (`Words.weights`). A text without words has 0 for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen2.corpus.filters import characters as ch
from qwen2.corpus.filters import stop_words
from qwen2.corpus.filters.words import Words

STATISTICS = (
    "words",
    "mean_word_length",
    "hashes_per_word",
    "ellipses_per_word",
    "bullet_lines",
    "ellipsis_lines",
    "alphabetic_words",
    "stop_words",
)
Numbers = NDArray[np.float64]


def measure(
    texts: Sequence[str], words: Words, languages: Sequence[str | None]
) -> dict[str, Numbers]:
    """The statistics of each text, (texts,) each, from the `words` of the same texts."""
    weights = words.weights
    total = np.maximum(words.per_text(weights), 1e-9)
    content = weights * ((words.bits & ch.CONTENT) != 0)
    letters = weights * ((words.bits & ch.ALPHA) != 0)
    count = words.per_text(content)
    characters = words.per_text(words.lengths * ((words.bits & ch.CONTENT) != 0))
    hashes = np.array([text.count("#") for text in texts], np.float64)
    ellipses = np.array([text.count("...") + text.count("…") for text in texts], np.float64)
    there = words.counts > 0
    bullets, trailing = _lines(texts)
    return {
        "words": count,
        "mean_word_length": np.where(count > 0, characters / np.maximum(count, 1e-9), 0.0),
        "hashes_per_word": np.where(there, hashes / total, 0.0),
        "ellipses_per_word": np.where(there, ellipses / total, 0.0),
        "bullet_lines": bullets,
        "ellipsis_lines": trailing,
        "alphabetic_words": words.per_text(letters) / total,
        "stop_words": _stop_words(texts, words, languages),
    }


def _lines(texts: Sequence[str]) -> tuple[Numbers, Numbers]:
    """Shares of lines that begin with a bullet, and that end with an ellipsis."""
    shares = np.zeros((2, len(texts)))
    for index, text in enumerate(texts):
        lines = text.splitlines()
        if "-" in text or "•" in text:
            begins = sum(line.lstrip()[:1] in BULLETS for line in lines)
            shares[0, index] = begins / max(len(lines), 1)
        if "..." in text or "…" in text:
            ends = sum(line.rstrip().endswith(("...", "…")) for line in lines)
            shares[1, index] = ends / max(len(lines), 1)
    return shares[0], shares[1]


BULLETS = frozenset("-•")


def _stop_words(texts: Sequence[str], words: Words, languages: Sequence[str | None]) -> Numbers:
    every, of_language = stop_words.hashes()
    rank = np.minimum(np.searchsorted(every, words.hashes), len(every) - 1)
    found = np.flatnonzero(every[rank] == words.hashes)
    pairs = np.unique(words.texts[found] * len(every) + rank[found])
    seen: list[set[int]] = [set() for _ in texts]
    for text, which in zip(
        (pairs // len(every)).tolist(), (pairs % len(every)).tolist(), strict=True
    ):
        seen[text].add(which)
    counts = np.zeros(len(texts))
    for index, (text, language) in enumerate(zip(texts, languages, strict=True)):
        if language in of_language:
            counts[index] = len(seen[index] & of_language[language])
        elif language in stop_words.UNSPACED:
            counts[index] = sum(word in text for word in stop_words.inside(language))
    return counts
