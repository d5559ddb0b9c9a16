"""Rules: what they say, of whom, and that stored numbers can be judged again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.corpus.filters import Failure, Limits, Rule, Rules

RULES = Rules(
    rules=(
        Rule(name="length", statistic="words", least=5, greatest=10),
        Rule(name="hashes", statistic="hashes", greatest=0.5),
    ),
    languages={"zh": {"length": Limits(least=2)}, "th": {"hashes": Limits()}},
)


def test_names_the_rule_its_value_and_its_limit() -> None:
    failures = RULES.judge({"words": 4, "hashes": 0.6}, "en")
    assert failures == (
        Failure("length", "words", 4.0, 5, 10),
        Failure("hashes", "hashes", 0.6, None, 0.5),
    )
    assert [str(failure) for failure in failures] == [
        "length: words 4 < 5",
        "hashes: hashes 0.6 > 0.5",
    ]
    assert str(RULES.judge({"words": 11, "hashes": 0}, None)[0]) == "length: words 11 > 10"


def test_limits_include_their_ends_and_depend_on_the_language() -> None:
    assert RULES.judge({"words": 5, "hashes": 0.5}, "en") == ()
    assert RULES.judge({"words": 10, "hashes": 0.5}, None) == ()
    assert RULES.judge({"words": 2, "hashes": 0}, "zh") == ()
    assert RULES.judge({"words": 99, "hashes": 0}, "zh") == ()
    assert [f.rule for f in RULES.judge({"words": 1, "hashes": 9}, "th")] == ["length"]


@given(
    st.lists(
        st.tuples(st.floats(0, 20), st.floats(0, 1), st.sampled_from(["en", "zh", "th", None])),
        max_size=8,
    )
)
def test_many_at_once_are_judged_as_one_by_one(rows: list[tuple[float, float, str | None]]) -> None:
    columns = {"words": np.array([r[0] for r in rows]), "hashes": np.array([r[1] for r in rows])}
    together = RULES.judge_all(columns, [r[2] for r in rows])
    alone = [RULES.judge({"words": a, "hashes": b}, language) for a, b, language in rows]
    assert together == alone


@given(st.floats(0, 20), st.floats(0, 5))
def test_relaxed_limits_drop_no_more(words: float, slack: float) -> None:
    relaxed = Rules(
        rules=(Rule(name="length", statistic="words", least=5 - slack, greatest=10 + slack),)
    )
    strict = Rules(rules=(Rule(name="length", statistic="words", least=5, greatest=10),))
    if strict.judge({"words": words}, None) == ():
        assert relaxed.judge({"words": words}, None) == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rules": [{"name": "a", "statistic": "s", "least": 2, "greatest": 1}]}, "above greatest"),
        ({"rules": [{"name": "a", "statistic": "s"}] * 2}, "two rules are called a"),
        ({"rules": [], "languages": {"zh": {"b": {}}}}, "languages.zh: no rule is called 'b'"),
        ({"rules": [{"name": "a", "statistic": "s", "min": 2}]}, "unknown key"),
    ],
)
def test_bad_rules_are_one_line(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Rules.parse(values)


def test_a_statistic_that_was_not_measured_is_named() -> None:
    with pytest.raises(UserError, match="no statistic 'hashes' was measured"):
        RULES.judge({"words": 4}, "en")
