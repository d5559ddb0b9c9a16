"""All measures of a batch of texts in one go, and the rules that stand in a recipe by default.

The text is cut into words once; Gopher's quality and repetition statistics are of the text as it
comes, C4's and FineWeb's of the lines that C4 keeps, as the stages of a pipeline would see it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import field_validator

from qwen2.common.config import Config
from qwen2.corpus.filters import c4, code, fineweb, gopher, repetition, unicode
from qwen2.corpus.filters.c4 import C4Lines
from qwen2.corpus.filters.defaults import CODE_RULES, TEXT_RULES
from qwen2.corpus.filters.pii import PII
from qwen2.corpus.filters.rules import Rules
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


class FilterConfig(Config):
    """Editors and thresholds of a recipe."""

    lines: C4Lines | None = C4Lines()
    """Which lines C4's editor keeps; None: all."""
    pii: PII = PII()
    text: Rules = TEXT_RULES
    code: Rules = CODE_RULES

    @field_validator("text", "code")
    @classmethod
    def _measured(cls, rules: Rules, info: object) -> Rules:
        known = TEXT_STATISTICS if getattr(info, "field_name", "") == "text" else CODE_STATISTICS
        for name in sorted(rules.statistics - set(known)):
            raise ValueError(f"no statistic is called {name!r}; known: {', '.join(known)}")
        return rules


def measure_text(
    texts: Sequence[str], languages: Sequence[str | None], lines: C4Lines | None = None
) -> dict[str, Numbers]:
    """`TEXT_STATISTICS` of each text, (texts,) each, all finite.

    Args:
        texts: as their editors left them, but for C4's.
        languages: ISO 639 codes; only the list of stop words depends on them.
        lines: C4's editor; its statistics and FineWeb's are of the lines that it keeps.
    """
    columns: dict[str, list[Numbers]] = {name: [] for name in TEXT_STATISTICS}
    for part in batches(texts):
        some, of_some = texts[part], languages[part]
        words = split(some)
        numbers = gopher.measure(some, words, of_some)
        numbers |= repetition.measure(some, words)
        numbers |= unicode.measure(some)
        if lines is not None:
            some = [c4.keep_lines(text, lines) for text in some]
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
