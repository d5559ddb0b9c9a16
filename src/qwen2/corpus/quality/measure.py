"""How well scores agree with labels: figures over held-out texts, by language."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen2.common.config import Config
from qwen2.corpus.mixing_law import ranks
from qwen2.corpus.quality.labels import GOOD

ALL = "all"

Scores = NDArray[np.float64]


class Agreement(Config):
    """What scores are worth on some labelled texts."""

    good: int
    bad: int
    auc: float | None
    """Chance that a good text scores more than a bad one; None without both."""
    accuracy: float
    """Part on the right side of the threshold."""


def agreement(scores: Scores, targets: Scores, threshold: float = 0.5) -> Agreement:
    """Compare `scores` (texts,) with `targets` (texts,), which are good from 0.5 on."""
    good = targets >= GOOD
    return Agreement(
        good=int(good.sum()),
        bad=int((~good).sum()),
        auc=area(scores, good),
        accuracy=float(((scores >= threshold) == good).mean()),
    )


def by_language(
    scores: Scores, targets: Scores, languages: Sequence[str], threshold: float = 0.5
) -> dict[str, Agreement]:
    """`agreement` of all texts and of each language's, the largest language first."""
    names = np.array(languages, dtype=object)
    kinds, counts = np.unique(names.astype(str), return_counts=True)
    found = {ALL: agreement(scores, targets, threshold)}
    for name in kinds[np.lexsort((kinds, -counts))]:
        of_it = names == name
        found[str(name)] = agreement(scores[of_it], targets[of_it], threshold)
    return found


def area(scores: Scores, good: NDArray[np.bool_]) -> float | None:
    """Area under the curve of true and false positives (Mann and Whitney's U); ties count half."""
    many, few = int(good.sum()), int((~good).sum())
    if not many or not few:
        return None
    return float((ranks(scores)[good].sum() - many * (many + 1) / 2) / (many * few))
