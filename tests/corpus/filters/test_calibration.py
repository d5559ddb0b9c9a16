"""Calibration by hand, its promises on any numbers, and on translated books."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.corpus.filters import (
    CalibrationConfig,
    Limits,
    Rule,
    Rules,
    calibrate,
    with_limits,
)
from qwen2.corpus.filters.calibration import differ, wilson

PARALLEL = Path(__file__).parents[2] / "golden" / "parallel.npz"
LEAST = Rules(rules=(Rule(name="few", statistic="s", least=10),))
MOST = Rules(rules=(Rule(name="many", statistic="s", greatest=100),))


def columns(*groups: np.ndarray) -> dict[str, np.ndarray]:
    return {"s": np.concatenate(groups).astype(float)}


def test_a_limit_is_moved_to_the_same_quantile() -> None:
    # English 0 ... 99: 10 % are below 10. Twice as small elsewhere: 20 % are; 10 % are below 5.
    english, other = np.arange(100), np.arange(100) / 2
    found = calibrate(LEAST, columns(english, other), ["en"] * 100 + ["xx"] * 100)
    assert found.languages == {"xx": {"few": Limits(least=5)}}
    (one,) = found.evidence
    assert (one.documents, one.reference_documents) == (100, 100)
    assert (one.reference_share, one.before, one.after) == (0.1, 0.2, 0.1)
    assert one.low < one.limit < one.high < one.published
    # A greatest limit is the mirror image: 10 % are above 100.
    english, other = np.arange(11, 111), np.arange(11, 111) * 1.25
    found = calibrate(MOST, columns(english, other), ["en"] * 100 + ["xx"] * 100)
    assert found.languages == {"xx": {"many": Limits(greatest=125)}}
    assert found.evidence[0].after == 0.1


def test_a_difference_that_may_be_chance_changes_nothing() -> None:
    english, other = np.arange(100), np.arange(100) - 2  # 10 % and 12 %
    found = calibrate(LEAST, columns(english, other), ["en"] * 100 + ["xx"] * 100)
    assert found.languages == {}
    assert not found.evidence[0].changed
    sure = columns(np.arange(1e5) / 1000, np.arange(1e5) / 1000 - 2)
    found = calibrate(LEAST, sure, ["en"] * 100_000 + ["xx"] * 100_000)
    assert found.languages == {"xx": {"few": Limits(least=8)}}


def test_no_limit_is_more_than_the_factor_away() -> None:
    labels = ["en"] * 100 + ["xx"] * 100
    english, other = np.arange(100), np.arange(100) / 3  # the quantile is 3.33
    found = calibrate(LEAST, columns(english, other), labels)
    assert found.languages == {"xx": {"few": Limits(least=5)}}
    assert found.evidence[0].after == 0.15  # not surely different from 0.1
    strict = calibrate(LEAST, columns(english, english * 50), labels)
    assert strict.languages == {"xx": {"few": Limits(least=20)}}
    none = calibrate(LEAST, columns(english, english / 50), labels)
    assert none.languages == {"xx": {"few": Limits()}}
    assert not none.evidence[0].fits
    wide = calibrate(
        LEAST, columns(english, english / 50), labels, config=CalibrationConfig(factor=100)
    )
    assert wide.languages == {"xx": {"few": Limits(least=0.2)}}


def test_both_ends_of_a_rule_are_looked_at() -> None:
    rules = Rules(rules=(Rule(name="r", statistic="s", least=10, greatest=90),))
    english, other = np.arange(101), np.r_[np.arange(50) / 2, np.arange(50, 101)]
    found = calibrate(rules, columns(english, other), ["en"] * 101 + ["xx"] * 101)
    assert found.languages == {"xx": {"r": Limits(least=5, greatest=90)}}
    assert [one.end for one in found.evidence] == ["least", "greatest"]


def test_translations_are_compared_with_what_they_translate() -> None:
    # Short texts were translated, long ones not: the language is no different.
    english, other = np.arange(200), np.arange(100)
    labels, texts = ["en"] * 200 + ["xx"] * 100, [*map(str, range(200)), *map(str, range(100))]
    assert calibrate(LEAST, columns(english, other), labels, texts).languages == {}
    (one,) = calibrate(LEAST, columns(english, other), labels, texts).evidence
    assert one.reference_share == one.before == 0.1
    blind = calibrate(LEAST, columns(english * 10, other), labels)
    assert blind.evidence[0].reference_share != blind.evidence[0].before


def test_few_documents_give_no_limit() -> None:
    labels = ["en"] * 100 + ["xx"] * 59
    found = calibrate(LEAST, columns(np.arange(100), np.zeros(59)), labels)
    assert found.languages == {}
    assert found.skipped == {"xx": 59}


@settings(max_examples=60)
@given(
    st.lists(st.floats(0, 100, width=16), min_size=10, max_size=60),
    st.lists(st.floats(0, 100, width=16), min_size=10, max_size=60),
    st.floats(1, 90),
    st.sampled_from(["least", "greatest"]),
)
def test_promises(english: list[float], other: list[float], limit: float, end: str) -> None:
    rules = Rules(rules=(Rule(name="r", statistic="s", **{end: limit}),))
    labels = ["en"] * len(english) + ["xx"] * len(other)
    config = CalibrationConfig(least_documents=10, confidence=0.5)
    numbers = columns(np.array(english), np.array(other))
    found = calibrate(rules, numbers, labels, config=config)
    (one,) = found.evidence
    new = with_limits(rules, found.languages)
    dropped = [bool(v) for v in new.judge_all(numbers, labels)]
    # English is judged as before, and what is said of the language is so.
    assert (
        dropped[: len(english)]
        == [bool(v) for v in rules.judge_all(numbers, labels)][: len(english)]
    )
    assert np.mean(dropped[len(english) :]) == pytest.approx(one.after)
    if one.limit is None:
        assert one.before > one.reference_share
    else:
        assert limit / 2 <= one.limit <= limit * 2
        assert one.changed or one.after == one.before
        if one.changed and one.before > one.reference_share:
            assert one.after <= one.before
    order = np.random.default_rng(0).permutation(len(labels))
    shuffled = calibrate(
        rules, {"s": numbers["s"][order]}, [labels[i] for i in order], config=config
    )
    assert shuffled == found


def test_intervals_by_hand() -> None:
    # Wilson's for 10 of 100 at 95 %, as published tables have it.
    assert wilson(10, 100, 0.95) == pytest.approx((0.0552, 0.1744), abs=1e-4)
    assert wilson(0, 20, 0.95)[0] == 0
    # Newcombe 1998, table II, column (a): 56/70 - 48/80, 0.0524 to 0.3339.
    assert differ((56, 70), (48, 80), 0.95)
    assert not differ((9, 10), (3, 10), 0.9999)


@pytest.mark.parametrize(
    ("values", "labels", "texts", "message"),
    [
        ({}, ["en"], None, "no statistic 's'"),
        ({"s": np.zeros(2)}, ["en"], None, "2 values of 's' for 1 documents"),
        ({"s": np.zeros(70)}, ["en"] * 70, ["a"], "1 names of texts for 70 documents"),
        ({"s": np.zeros(9)}, ["en"] * 9, None, "9 documents in 'en', the reference; it needs 60"),
    ],
)
def test_what_cannot_be_calibrated_is_said(values, labels, texts, message: str) -> None:
    with pytest.raises(UserError, match=message):
        calibrate(LEAST, values, labels, texts)


def test_limits_are_merged_rule_by_rule() -> None:
    rules = Rules(
        rules=(Rule(name="a", statistic="s"), Rule(name="b", statistic="s")),
        languages={"xx": {"a": Limits(least=1), "b": Limits(least=2)}},
    )
    merged = with_limits(rules, {"xx": {"b": Limits(least=3)}, "yy": {"a": Limits()}})
    assert merged.languages == {
        "xx": {"a": Limits(least=1), "b": Limits(least=3)},
        "yy": {"a": Limits()},
    }
