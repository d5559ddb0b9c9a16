"""AUC against its definition; figures by language."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.corpus.quality.measure import area, by_language

PAIRS = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=30)


@given(PAIRS)
def test_auc_is_the_chance_that_the_good_text_comes_first(pairs: list[tuple[int, bool]]) -> None:
    scores = np.array([score for score, _ in pairs], float)
    good = np.array([is_good for _, is_good in pairs])
    wins = [float(g > b) + (g == b) / 2 for g in scores[good] for b in scores[~good]]
    found = area(scores, good)
    if not wins:
        assert found is None
    else:
        assert found == pytest.approx(np.mean(wins))


def test_figures_of_each_language_the_largest_first() -> None:
    scores = np.array([0.9, 0.2, 0.4, 0.6, 0.7])
    targets = np.array([1.0, 0.0, 1.0, 0.0, 0.8])
    found = by_language(scores, targets, ["en", "en", "de", "de", "de"])
    assert list(found) == ["all", "de", "en"]
    assert found["en"].auc == 1.0
    assert found["en"].accuracy == 1.0
    assert (found["de"].good, found["de"].bad, found["de"].auc) == (2, 1, 0.5)
    assert found["de"].accuracy == pytest.approx(1 / 3)
    assert found["all"].auc == pytest.approx(5 / 6)
