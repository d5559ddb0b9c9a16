"""Schedules, by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from qwen2.train.schedules import WSD, Cosine, Schedule, cosine, wsd


def test_cosine_by_hand() -> None:
    factors = [cosine(step, steps=12, warmup=4, floor=0.2) for step in (0, 1, 3, 4, 8, 12, 20)]
    # After warm-up: 0.2 + 0.8·(1 + cos(π·t/8))/2 at t = 0, 4, 8; the floor beyond the end.
    assert factors == pytest.approx([0.25, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2])


def test_wsd_by_hand() -> None:
    steps = (0, 1, 2, 5, 6, 7, 8, 9, 10, 11)
    factors = [wsd(step, steps=10, warmup=2, decay=4, floor=0.2) for step in steps]
    assert factors == pytest.approx([0.5, 1.0, 1.0, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2, 0.2])


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
    ):
        factor = schedule.factor(step, steps)
        assert 0 <= factor <= 1
        assert factor > 0 or step >= warmup


def test_recipes_choose_by_kind() -> None:
    read = TypeAdapter(Schedule).validate_python
    assert read({"kind": "wsd", "decay": 5}) == WSD(decay=5)
    assert read({"kind": "cosine", "warmup": 3}) == Cosine(warmup=3)
