"""What trained scorers are worth: agreement with labels and with each other, shares kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2.corpus.mixing_law import spearman
from qwen2.corpus.quality.calibrate import Calibration
from qwen2.corpus.quality.config import BITS, HEAD, PERPLEXITY, QUALITY
from qwen2.corpus.quality.labels import Example
from qwen2.corpus.quality.measure import by_language
from qwen2.pipeline.quality.examples import targets_of

KEPT = 0.3  # share that the example of one threshold keeps
FEW = 20  # documents of a language below which its share says nothing

Scores = Mapping[str, NDArray[np.float64]]
Figures = dict[str, Any]


def compare(
    columns: Scores,
    examples: Sequence[Example],
    reference: tuple[Scores, Sequence[Example]],
    least: int,
) -> Figures:
    """Agreement with held-out labels by language, of scorers with each other, and shares kept.

    Args:
        columns: raw scores of `examples`, which were held out.
        reference: the same of the sample for percentiles.
        least: documents that a language needs for percentiles of its own.
    """
    worth = {name: better(name, values) for name, values in columns.items()}
    known = np.logical_and.reduce([np.isfinite(values) for values in worth.values()])
    targets = targets_of(examples)[known]
    languages = [each.language for each, is_known in zip(examples, known, strict=True) if is_known]
    worth = {name: values[known] for name, values in worth.items()}
    return {
        "agreement": {name: _agreed(name, v, targets, languages) for name, v in worth.items()},
        "rank_correlation": {a: {b: spearman(worth[a], worth[b]) for b in worth} for a in worth},
        "kept": kept_shares(*reference, least),
    }


def better(name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`values`, turned round where a low one is the better: a predictable text."""
    return -values if name in (PERPLEXITY, BITS) else values


def _agreed(
    name: str, values: NDArray[np.float64], targets: NDArray[np.float64], languages: Sequence[str]
) -> Figures:
    """Agreement by language; a score that is no probability has no right or wrong at 0.5."""
    left_out = set() if name in (QUALITY, HEAD) else {"accuracy"}
    found = by_language(values, targets, languages)
    return {language: figures.model_dump(exclude=left_out) for language, figures in found.items()}


def kept_shares(columns: Scores, examples: Sequence[Example], least: int) -> Figures:
    """What one threshold that keeps `KEPT` of all keeps of each language: raw and by percentile.

    The percentiles come of every other document, the shares of those between.
    """
    languages = np.array([each.language for each in examples], dtype=object)
    half = {name: values[::2] for name, values in columns.items()}
    calibration = Calibration.fit(half, languages[::2].tolist(), max(1, least // 2))
    asked = languages[1::2]
    kinds, counts = np.unique(asked.astype(str), return_counts=True)
    order = [(str(kinds[i]), int(counts[i])) for i in np.argsort(-counts, kind="stable")]
    found: Figures = {}
    for name, values in columns.items():
        raw = values[1::2]
        percentile = calibration.percentiles(name, raw, asked.tolist())
        kept = {"raw": _best(better(name, raw)), "percentile": _best(better(name, percentile))}
        found[name] = {
            kind: {
                "documents": count,
                "own": kind in calibration.tables[name],
                **{how: float(which[asked == kind].mean()) for how, which in kept.items()},
            }
            for kind, count in order
            if count >= FEW
        }
    return found


def _best(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which are among the `KEPT` best."""
    return values >= np.nanquantile(values, 1 - KEPT)
