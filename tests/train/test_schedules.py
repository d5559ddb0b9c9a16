"""Schedules, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from qwen2.train.schedules import (
    WSD,
    Constant,
    Cosine,
    InverseSqrt,
    Linear,
    Schedule,
    cosine,
    inverse_sqrt,
    linear,
    wsd,
)


def test_cosine_by_hand() -> None:
    factors = [cosine(step, steps=12, warmup=4, floor=0.2) for step in (0, 1, 3, 4, 8, 12, 20)]
    # After warm-up: 0.2 + 0.8·(1 + cos(π·t/8))/2 at t = 0, 4, 8; the floor beyond the end.
    assert factors == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2])


def test_wsd_by_hand() -> None:
    steps = (0, 1, 2, 5, 6, 7, 8, 9, 10, 11)
    factors = [wsd(step, steps=10, warmup=2, decay=4, floor=0.2) for step in steps]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


def test_linear_by_hand() -> None:
    factors = [linear(step, steps=10, warmup=2, floor=0.2) for step in (0, 1, 2, 3, 6, 10, 20)]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 0.9, 0.6, 0.2, 0.2])
    assert linear(5, steps=4, warmup=6, floor=0.2) == 1.0, "the warm-up is longer than the run"


def test_inverse_sqrt_by_hand() -> None:
    factors = [inverse_sqrt(step, 99, warmup=4, decay=0, floor=0) for step in (0, 3, 8, 15, 63)]
    assert factors == pytest.approx([0.25, 1.0, 2 / 3, 0.5, 0.25])
    # Over the last 9 steps times 1, 3/4, 1/2, and the floor of 1/4 at the end and beyond.
    cooled = [inverse_sqrt(step, 24, warmup=4, decay=9, floor=0.25) for step in (15, 18, 21, 24)]
    shares = [1.0, 0.75, 0.5, 0.25]
    assert cooled == pytest.approx(
        [s * 2 / (n + 1) ** 0.5 for s, n in zip(shares, (15, 18, 21, 24), strict=True)]
    )


def test_constant_by_hand() -> None:
    factors = [Constant(warmup=4).factor(step, 6) for step in (0, 1, 3, 4, 5, 9)]
    assert factors == [0.25, 0.5, 1.0, 1.0, 1.0, 1.0]


@given(
    step=st.integers(0, 300),
    steps=st.integers(1, 200),
    warmup=st.integers(0, 50),
    decay=st.integers(1, 100),
    floor=st.floats(0, 1),
)
def test_factors_are_positive_and_at_most_one(
    step: int, steps: int, warmup: int, decay: int, floor: float
) -> None:
    for schedule in (
        Cosine(warmup=warmup, floor=floor),
        WSD(warmup=warmup, decay=decay, floor=floor),
        Linear(warmup=warmup, floor=floor),
        InverseSqrt(warmup=warmup + 1, decay=decay, floor=floor),
        Constant(warmup=warmup),
    ):
        factor = schedule.factor(step, steps)
        assert 0 <= factor <= 1
        assert factor > 0 or step >= warmup


def test_recipes_choose_by_kind() -> None:
    read = TypeAdapter(Schedule).validate_python
    assert read({"kind": "wsd", "decay": 5}) == WSD(decay=5)
    assert read({"kind": "cosine", "warmup": 3}) == Cosine(warmup=3)
    assert read({"kind": "linear"}) == Linear()
    assert read({"kind": "inverse_sqrt", "warmup": 3}) == InverseSqrt(warmup=3)
    assert read({"kind": "constant"}) == Constant()
