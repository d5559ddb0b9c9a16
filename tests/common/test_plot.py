"""Charts are well-formed, carry their data, and escape their names."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.plot import (
    HEIGHT,
    WIDTH,
    bar_chart,
    line_chart,
    scatter_chart,
    stacked_bars,
    ticks,
)

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.94, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
        (5, 5, [5, 6, 7, 8, 9, 10]),
    ],
)
def test_ticks_by_hand(low: float, high: float, expected: list[float]) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    if low != high:
        assert marks == expected


@given(st.floats(-1e9, 1e9), st.floats(1e-3, 1e9))
def test_ticks_cover_any_range_with_a_handful(low: float, span: float) -> None:
    marks = ticks(low, low + span)
    slack = 1e-6 * max(abs(low), span)
    assert marks[0] <= low + slack
    assert marks[-1] >= low + span - slack
    assert 2 <= len(marks) <= 12


def test_lines_are_where_their_points_are() -> None:
    chart = line_chart({"a<b": [(0, 1), (10, 3)], "c": [(5, math.nan), (5, 2)]}, "x", "y & z")
    root = ElementTree.fromstring(chart)
    first, second = root.iter(f"{SVG}polyline")
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in first.attrib["points"].split())
    assert 0 < x0 < x1 < WIDTH
    assert HEIGHT > y0 > y1 > 0
    assert len(second.attrib["points"].split()) == 1
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"a<b", "c", "x", "y & z"} <= set(texts)


def test_bars_have_the_height_of_their_values() -> None:
    root = ElementTree.fromstring(
        bar_chart({"k": {"one": 1.0, "two": 2.0}, "l": {"two": 1.5}}, "y")
    )
    heights = [float(r.attrib["height"]) for r in root.iter(f"{SVG}rect") if "height" in r.attrib]
    one, two, last = [height for height in heights if height != 10]
    assert two == pytest.approx(2 * one, rel=1e-2)
    assert last == pytest.approx(1.5 * one, rel=1e-2)


def test_a_chart_of_nothing_is_still_a_chart() -> None:
    ElementTree.fromstring(line_chart({}, "x", "y"))
    ElementTree.fromstring(line_chart({"a": []}, "x", "y"))


def test_dots_on_the_diagonal_are_where_both_axes_say_the_same() -> None:
    chart = ElementTree.fromstring(scatter_chart({"a": [(0, 0), (1, 1)], "b": [(0, 1)]}, "x", "y"))
    dots = [(float(d.get("cx", 0)), float(d.get("cy", 0))) for d in chart.iter(f"{SVG}circle")]
    dashed = next(d for d in chart.iter(f"{SVG}line") if d.get("stroke-dasharray"))
    assert dots[0] == (float(dashed.get("x1", 0)), float(dashed.get("y1", 0)))
    assert dots[1] == (float(dashed.get("x2", 0)), float(dashed.get("y2", 0)))
    assert dots[2] == (dots[0][0], dots[1][1])
    assert "<circle" not in scatter_chart({}, "x", "y")


def test_names_of_rows_have_room() -> None:
    names = ["short", "developers-reference-translated", "x" * 60]
    drawn = stacked_bars({name: {"a": 1.0} for name in names}, "megabytes")
    starts = [float(x) for x in re.findall(r'<rect x="([\d.]+)" y="\d\d+" width="\d', drawn)]
    ends = re.findall(r'<text x="(\d+)"[^>]*text-anchor="end">([^<]*)<title>([^<]*)', drawn)
    assert [title for *_, title in ends] == names
    assert [name for _, name, _ in ends] == [*names[:2], "x" * 43 + "…"]
    for end, name, _ in ends:
        assert 7 * len(name) <= int(end) < min(starts)
