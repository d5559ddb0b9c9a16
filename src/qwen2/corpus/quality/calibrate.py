"""From raw scores to percentiles of each language, so that one threshold means one share.

A classifier's raw score of 0.7 may be the best tenth of one language and the worst of another:
its labels, and its base model's training, are mostly of the large languages. A percentile of 0.7
says that seven tenths of the language's documents in a reference sample score less, in any
language; a threshold of 0.7 keeps the same three tenths of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from qwen2.common.errors import UserError
from qwen2.common.files import durable_write
from qwen2.corpus.quality.files import read_tensors

KNOTS = 1001
"""Quantiles that are kept of a language: a tenth of a percent apart."""
LEAST = 200
"""Documents below which a language's own quantiles say too little."""
ALL = "*"
"""Stands for the documents of all languages."""

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Quantiles:
    """The distribution of a sample of scores."""

    values: Scores
    """Scores in order, (knots,), evenly spaced in rank; equal ones may be repeated."""

    @classmethod
    def of(cls, scores: Scores) -> Self:
        """The quantiles of a sample, all of it where it is small."""
        if len(scores) <= KNOTS:
            return cls(np.sort(scores))
        ranks = (np.arange(KNOTS) + 0.5) / KNOTS
        return cls(np.sort(np.quantile(scores, ranks, method="hazen")))  # rounding may unsort them

    def percentiles(self, scores: Scores) -> Scores:
        """The part of the sample below each score, half of the equal ones included: 0 to 1.

        Never falls as the score rises. A score that is not a number stays so.
        """
        count = len(self.values)
        knots, firsts, repeated = np.unique(self.values, return_index=True, return_counts=True)
        levels = (firsts + repeated / 2) / count
        found = np.interp(scores, knots, levels)
        found = np.where(scores < knots[0], 0.0, np.where(scores > knots[-1], 1.0, found))
        return np.where(np.isnan(scores), np.nan, found)


@dataclass(frozen=True)
class Calibration:
    """Quantiles of several kinds of score, for each language that has enough documents."""

    tables: Mapping[str, Mapping[str, Quantiles]]
    """Score (`quality`, `head` ...) -> language, or `*` for all -> its quantiles."""

    @classmethod
    def fit(
        cls, columns: Mapping[str, Scores], languages: Sequence[str], least: int = LEAST
    ) -> Self:
        """The calibration by a reference sample, which should be drawn as the corpus is.

        Args:
            columns: each score of all documents of the sample, (documents,).
            languages: of the documents.
            least: documents that a language needs for quantiles of its own.

        Raises:
            UserError: a score has no number at all.
        """
        tables = {}
        names = np.array(languages, dtype=object)
        for score, values in columns.items():
            known = np.isfinite(values)
            if not known.any():
                raise UserError(f"calibration of {score!r}: the sample has no scores")
            table = {ALL: Quantiles.of(values[known])}
            for language in sorted(set(names[known])):
                own = values[known & (names == language)]
                if len(own) >= least:
                    table[language] = Quantiles.of(own)
            tables[score] = table
        return cls(tables)

    def percentiles(self, score: str, values: Scores, languages: Sequence[str]) -> Scores:
        """The percentile of each document in its language, (documents,); see `Quantiles`.

        Raises:
            UserError: this is no calibration of `score`.
        """
        if score not in self.tables:
            raise UserError(f"calibration: none of {score!r}; fit it with all scorers at once")
        table = self.tables[score]
        found = np.empty(len(values))
        names = np.array([name if name in table else ALL for name in languages], dtype=object)
        for language in set(names):
            of_it = names == language
            found[of_it] = table[language].percentiles(values[of_it])
        return found

    def save(self, path: Path) -> None:
        """Write all quantiles into a safetensors file, durably."""
        tensors = {
            f"{score}/{language}": quantiles.values
            for score, table in self.tables.items()
            for language, quantiles in table.items()
        }
        durable_write(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> Self:
        """What `save` wrote.

        Raises:
            UserError: it is missing, damaged or something else.
        """
        tables: dict[str, dict[str, Quantiles]] = {}
        for name, values in sorted(read_tensors(path).items()):
            score, slash, language = name.partition("/")
            if not slash or values.ndim != 1 or not len(values):
                raise UserError(f"{path}: {name!r} is no list of quantiles; fit it again")
            tables.setdefault(score, {})[language] = Quantiles(values.astype(np.float64))
        for score, table in tables.items():
            if ALL not in table:
                raise UserError(
                    f"{path}: no quantiles of {score!r} for all languages; fit it again"
                )
        return cls(tables)
