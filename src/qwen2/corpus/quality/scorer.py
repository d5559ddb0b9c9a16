"""What scores documents, one part of a corpus at a time; and the linear classifier as one.

Columns of a scorer are stored beside the documents; thresholds are rules over the stored numbers
(corpus/filters/rules.py), so that another threshold never reads a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qwen2.corpus.quality.calibrate import Calibration
from qwen2.corpus.quality.config import QUALITY
from qwen2.corpus.quality.linear import Linear

Columns = dict[str, NDArray[np.float64]]

PERCENTILE = "_percentile"


class Scorer(Protocol):
    """Gives numbers to documents."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers, in their order."""

    def __call__(self, texts: Sequence[str], languages: Sequence[str]) -> Columns:
        """Each column for all `texts`, (texts,) in fp64; NaN where a text has no such number."""


class LinearScorer:
    """`quality`, 0 to 1, and where there is a calibration `quality_percentile`."""

    def __init__(self, linear: Linear, calibration: Calibration | None = None) -> None:
        self.linear, self.calibration = linear, calibration
        self.columns = with_percentiles((QUALITY,), calibration)

    def __call__(self, texts: Sequence[str], languages: Sequence[str]) -> Columns:
        """See `Scorer`."""
        scores = self.linear.scores(texts).astype(np.float64)
        return calibrated({QUALITY: scores}, languages, self.calibration)


def with_percentiles(names: Sequence[str], calibration: Calibration | None) -> tuple[str, ...]:
    """The names of `calibrated`'s columns."""
    if calibration is None:
        return tuple(names)
    return tuple(column for name in names for column in (name, name + PERCENTILE))


def calibrated(
    columns: Mapping[str, NDArray[np.float64]],
    languages: Sequence[str],
    calibration: Calibration | None,
) -> Columns:
    """`columns`, each followed by its percentiles, where there is a calibration."""
    found: Columns = {}
    for name, values in columns.items():
        found[name] = values
        if calibration is not None:
            found[name + PERCENTILE] = calibration.percentiles(name, values, languages)
    return found
