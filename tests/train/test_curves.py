"""Curves of bounded size: by hand, over any lengths, and the same however they were read."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.train.curves import Curves, History, flatten


def line(step: int, loss: float = 2.0, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl, of steps of 100 tokens that take half a second."""
    base = {"step": step, "loss": loss, "lr": 1e-3, "grad_norm": 0.5, "tokens": 100 * step}
    return base | {"tokens_per_s": 200.0, "mfu": 0.25, "memory_gb": 1.5} | more


def test_buckets_by_hand() -> None:
    curves = Curves(limit=4)
    for step, value in ((1, 1.0), (2, 5.0), (3, 3.0)):
        curves.add(step, {"a": value})
    assert curves.mean("a") == [(1, 1.0), (2, 5.0), (3, 3.0)]
    curves.add(4, {"a": 7.0})  # does not fit: 0-1, 2-3, 4-5, 6-7
    assert curves.width == 2
    assert curves.mean("a") == [(1, 1.0), (3, 4.0), (4, 7.0)]
    curves.add(5, {"a": 8.0})
    assert curves.mean("a")[-1] == (5, 7.5)
    assert curves.band("a") == [(1, 1.0, 1.0), (3, 3.0, 5.0), (5, 7.0, 8.0)]
    curves.add(40, {"a": 2.0})  # 0-15, 16-31, 32-47
    assert curves.width == 16
    assert curves.mean("a") == [(5, 24 / 5), (40, 2.0)]


def test_figures_come_and_go_and_what_is_not_finite_leaves_no_trace() -> None:
    curves = Curves(limit=4)
    curves.add(1, {"a": 1, "b": math.nan})
    curves.add(2, {"c": 3.0})
    curves.add(3, {"a": math.inf, "b": 2.0})
    assert curves.names == ["a", "b", "c"]
    assert (curves.mean("a"), curves.mean("b"), curves.mean("c")) == (
        [(1, 1.0)],
        [(3, 2.0)],
        [(2, 3.0)],
    )
    assert curves.mean("d") == curves.band("d") == []


@given(
    st.lists(st.tuples(st.integers(0, 50), st.floats(-1e6, 1e6)), min_size=1, max_size=200),
    st.sets(st.integers(0, 200)),
)
def test_nothing_is_lost_and_looking_changes_nothing(
    moves: list[tuple[int, float]], looks: set[int]
) -> None:
    plain, looked = Curves(limit=8), Curves(limit=8)
    step = 0
    for number, (ahead, value) in enumerate(moves):
        step += ahead
        plain.add(step, {"a": value})
        looked.add(step, {"a": value})
        if number in looks:
            looked.mean("a")
    values = [value for _, value in moves]
    band = plain.band("a")
    assert len(band) <= 8
    assert band[-1][0] == step
    assert min(low for _, low, _ in band) == min(values)
    assert max(high for _, _, high in band) == max(values)
    assert all(
        low - 1e-6 <= mean <= high + 1e-6
        for (_, low, high), (_, mean) in zip(band, plain.mean("a"), strict=True)
    )
    assert (plain.mean("a"), band) == (looked.mean("a"), looked.band("a"))


def test_a_long_run_keeps_its_spike() -> None:
    curves = Curves()
    for step in range(0, 1_000_000, 40):
        curves.add(step, {"a": 99.0 if step == 400_000 else 1.0})
    assert 500 <= len(curves.mean("a")) <= 1000
    assert max(high for _, _, high in curves.band("a")) == 99.0


def test_a_history_of_all_kinds_of_lines(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "skipped": "loss nan, gradient norm nan"},
        line(1, 4.0, expert_share=[0.75, 0.25], expert_entropy=0.8),
        line(2, 2.0, expert_share=[0.5, 0.5], expert_entropy=1.0),
        {"step": 2, "evaluation": {"code": 1.5, "by length": {"long": 1.0}, "note": "x"}},
        line(3, 2.0),
        {"step": 3, "evaluation": {"code": 1.25}},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
    history = History(steps=100)
    history.read(path)
    assert history.figures.mean("loss") == [(1, 4.0), (2, 2.0), (3, 2.0)]
    assert [round(y, 6) for _, y in history.figures.mean("smooth")] == [
        4.0,
        round(4 - 2 / 1.2, 6),
        round((4 - 2 / 1.2) + (2 - (4 - 2 / 1.2)) / 1.3, 6),
    ]
    assert history.shares.mean("0") == [(1, 0.75), (2, 0.5)]
    assert history.held_out.mean("code") == [(2, 1.5), (3, 1.25)]
    assert history.evaluations == [
        (2, {"code": 1.5, "by length long": 1.0}),
        (3, {"code": 1.25}),
    ]
    assert (history.skipped, list(history.skips)) == (1, [(0, "loss nan, gradient norm nan")])
    assert history.seconds == pytest.approx(1.5)
    assert history.last == lines[4]
    assert "expert_entropy" in history.figures.names
    assert not {"step", "tokens", "expert_share"} & set(history.figures.names)


def test_late_in_a_run_the_loss_is_smoothed_over_a_hundredth_of_it() -> None:
    history = History(steps=5000)
    for step in range(1, 2001):
        history.add(line(step, 3.0))
    history.add(line(2001, 4.0))
    assert history.figures.mean("smooth")[-1][1] == pytest.approx(3 + 1 / 50 / 2)  # of 2 steps
    assert history.figures.width == 4


def test_flat_names() -> None:
    assert flatten({"a": 1, "b": {"c": 2.5, "d": {"e": 3}}, "f": "text"}) == {
        "a": 1, "b c": 2.5, "b d e": 3,
    }  # fmt: skip
