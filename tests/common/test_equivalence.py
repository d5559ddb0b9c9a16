"""Two one-sided tests, held to numbers worked by hand and to tables of Student's distribution."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.equivalence import equivalence, t_probability, t_quantile
from qwen2.common.errors import UserError


def test_by_hand() -> None:
    """Differences 0.01, 0.02, 0.03: mean 0.02, deviation 0.01, error 0.01/sqrt(3), t(2) = 2.920."""
    found = equivalence([1.01, 2.02, 3.03], [1.0, 2.0, 3.0], margin=0.05)
    assert found.mean == pytest.approx(0.02)
    assert found.error == pytest.approx(0.0057735, rel=1e-4)
    assert (found.low, found.high) == pytest.approx((0.02 - 0.016859, 0.02 + 0.016859), abs=1e-5)
    # The nearer side: t = (0.05 - 0.02) / 0.0057735 = 3 sqrt(3); with two degrees of freedom
    # P(T > t) = (1 - t / sqrt(2 + t^2)) / 2.
    t = 3 * math.sqrt(3)
    assert found.p == pytest.approx((1 - t / math.sqrt(2 + t * t)) / 2, rel=1e-9)
    t = 2 * math.sqrt(3)
    assert found.p_different == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
    assert found.equivalent
    assert not equivalence([1.01, 2.02, 3.03], [1.0, 2.0, 3.0], margin=0.036).equivalent


@pytest.mark.parametrize(
    ("freedom", "probability", "t"),
    [(1, 0.95, 6.3138), (2, 0.95, 2.91999), (4, 0.975, 2.77645), (9, 0.99, 2.82144)],
)
def test_the_table_of_student(freedom: int, probability: float, t: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(t, abs=1e-4)
    assert t_probability(t, freedom) == pytest.approx(probability, abs=1e-5)
    assert t_probability(-t, freedom) == pytest.approx(1 - probability, abs=1e-5)


@given(st.floats(-30, 30), st.integers(1, 2000))
def test_the_distribution_is_scipys(t: float, freedom: int) -> None:
    stats = pytest.importorskip("scipy.stats", reason="the oracle is not installed")
    assert t_probability(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-11)


PAIRS = st.lists(st.tuples(st.floats(0, 5), st.floats(0, 5)), min_size=3, max_size=8)


@given(PAIRS, st.floats(1e-3, 2))
def test_equivalent_is_the_interval_within_the_margin(
    pairs: list[tuple[float, float]], margin: float
) -> None:
    one, other = zip(*pairs, strict=True)
    found = equivalence(one, other, margin)
    nearest = min(abs(found.low + margin), abs(found.high - margin))
    if nearest > 1e-6:
        assert found.equivalent == (-margin < found.low and found.high < margin)
    turned = equivalence(other, one, margin)
    assert turned.mean == pytest.approx(-found.mean)
    assert turned.p == pytest.approx(found.p, abs=1e-9)


def test_equal_runs_are_equivalent_within_any_margin() -> None:
    found = equivalence([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], margin=1e-6)
    assert found.equivalent
    assert (found.p, found.p_different) == (0.0, 1.0)
    assert equivalence([2.0, 3.0, 4.0], [1.0, 2.0, 3.0], margin=0.5).p == 1.0


def test_what_cannot_be_tested_is_refused() -> None:
    with pytest.raises(UserError, match="at least 3"):
        equivalence([1.0, 2.0], [1.0, 2.0], 0.1)
    with pytest.raises(UserError, match="give pairs"):
        equivalence([1.0, 2.0, 3.0], [1.0, 2.0], 0.1)
    with pytest.raises(UserError, match="above 0"):
        equivalence([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0.0)
