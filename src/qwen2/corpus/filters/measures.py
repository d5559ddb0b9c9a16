"""All measures of a batch of texts in one go.

The text is cut into words once; Gopher's quality and repetition statistics are of the text as it
comes, C4's and FineWeb's of the lines that C4 keeps, as the stages of a pipeline would see it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen2.corpus.filters import c4, code, fineweb, gopher, repetition, unicode
from qwen2.corpus.filters.words import batches, split

Numbers = NDArray[np.float64]

TEXT_STATISTICS = (
    *gopher.STATISTICS,
    *repetition.STATISTICS,
    *c4.STATISTICS,
    *fineweb.STATISTICS,
    *unicode.STATISTICS,
)
CODE_STATISTICS = (*code.STATISTICS, *unicode.STATISTICS)


def measure_text(
    texts: Sequence[str], languages: Sequence[str | None], kept: Sequence[str] | None = None
) -> dict[str, Numbers]:
    """`TEXT_STATISTICS` of each text, (texts,) each, all finite.

    Args:
        texts: as their editors left them, but for C4's.
        languages: ISO 639 codes; only the list of stop words depends on them.
        kept: the texts as `c4.keep_lines` left them, of which C4's statistics and FineWeb's are;
            None: they keep all.
    """
    columns: dict[str, list[Numbers]] = {name: [] for name in TEXT_STATISTICS}
    for part in batches(texts):
        some, of_some = texts[part], languages[part]
        words = split(some)
        numbers = gopher.measure(some, words, of_some)
        numbers |= repetition.measure(some, words)
        numbers |= unicode.measure(some)
        if kept is not None and kept[part] != some:
            some = kept[part]
            words = split(some)
        numbers |= c4.measure(some, words)
        numbers |= fineweb.measure(some, words)
        for name, values in numbers.items():
            columns[name].append(values)
    return _joined(columns)


def measure_code(texts: Sequence[str]) -> dict[str, Numbers]:
    """`CODE_STATISTICS` of each text, (texts,) each, all finite."""
    columns: dict[str, list[Numbers]] = {name: [] for name in CODE_STATISTICS}
    for part in batches(texts):
        some = texts[part]
        for name, values in (code.measure(some) | unicode.measure(some)).items():
            columns[name].append(values)
    return _joined(columns)


def _joined(columns: dict[str, list[Numbers]]) -> dict[str, Numbers]:
    return {
        name: np.concatenate(parts) if parts else np.zeros(0) for name, parts in columns.items()
    }
