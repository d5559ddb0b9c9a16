"""The default limits on translated books: each language is dropped about as often as the English
of the same texts, and each measured limit is needed. The numbers are of tests/golden/parallel.npz.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qwen2.corpus.filters import TEXT_RULES, Limits, Rules, defaults

Columns = dict[str, np.ndarray]


def load() -> tuple[np.ndarray, Columns, Columns]:
    """Language of each document; its statistics, and those of its English."""
    with np.load(Path(__file__).parents[2] / "golden" / "parallel.npz") as file:
        names = file["statistics"].tolist()
        # Half precision must not part what stands on a limit from it.
        own, english = (
            dict(zip(names, np.round(file[kind].astype(float), 3), strict=True))
            for kind in ("own", "english")
        )
        return file["languages"], own, english


LANGUAGES, OWN, ENGLISH = load()
MANY = [one for one in np.unique(LANGUAGES).tolist() if (one == LANGUAGES).sum() >= 60]
# What no language has for its own: only Gopher's two stop words.
PLAIN = Rules(
    rules=TEXT_RULES.rules,
    languages={one: {"gopher_stop_words": Limits(least=2)} for one in TEXT_RULES.languages},
)


def dropped(rules: Rules, columns: Columns, language: str, rows: np.ndarray) -> float:
    found = rules.judge_all({name: c[rows] for name, c in columns.items()}, [language] * rows.size)
    return float(np.mean([bool(failures) for failures in found]))


def share(limits: Limits, statistic: str, columns: Columns, rows: np.ndarray) -> float:
    rule = {"name": "r", "statistic": statistic, **limits.model_dump(include={"least", "greatest"})}
    return dropped(Rules.parse({"rules": [rule]}), columns, "", rows)


@pytest.mark.parametrize("language", MANY)
def test_is_dropped_about_as_often_as_its_english(language: str) -> None:
    rows = np.flatnonzero(language == LANGUAGES)
    english = dropped(TEXT_RULES, ENGLISH, "en", rows)
    assert dropped(TEXT_RULES, OWN, language, rows) == pytest.approx(english, abs=0.08)


def test_calibration_halves_the_distance_to_english() -> None:
    off = {True: [], False: []}
    for language in MANY:
        rows = np.flatnonzero(language == LANGUAGES)
        english = dropped(TEXT_RULES, ENGLISH, "en", rows)
        for calibrated in off:
            rules = TEXT_RULES if calibrated else PLAIN
            off[calibrated].append(abs(dropped(rules, OWN, language, rows) - english))
    assert len(MANY) >= 30
    assert np.mean(off[True]) < 0.03
    assert np.mean(off[False]) > 0.08


@pytest.mark.parametrize(
    ("rule", "language"), [(rule, one) for rule, limits in defaults.MEASURED for one in limits]
)
def test_each_limit_is_nearer_to_english_than_the_published_one(rule: str, language: str) -> None:
    rows = np.flatnonzero(language == LANGUAGES)
    (published,) = (one for one in TEXT_RULES.rules if one.name == rule)
    english_limits = TEXT_RULES.limits(published, "en")
    own_limits = TEXT_RULES.limits(published, language)
    english = share(english_limits, published.statistic, ENGLISH, rows)
    before = share(english_limits, published.statistic, OWN, rows)
    after = share(own_limits, published.statistic, OWN, rows)
    assert abs(after - english) < abs(before - english)
    assert after == pytest.approx(english, abs=0.05)
