"""Charts are well-formed, carry their data, and escape their names."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, log_ticks, ticks
from qwen2.common.plot import HEAT, bar_chart, heat_map, line_chart, scatter_chart, stacked_bars

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.94, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3, 7, [-4, -2, 0, 2, 4, 6, 8]),
        (5, 5, [5, 6, 7, 8, 9, 10]),
        (0, 3e-30, [0, 5e-31, 1e-30, 1.5e-30, 2e-30, 2.5e-30, 3e-30]),
    ],
)
def test_ticks_by_hand(low: float, high: float, expected: list[float]) -> None:
    marks = ticks(low, high)
    assert marks[0] <= low
    assert marks[-1] >= high
    if low != high:
        assert marks == expected


def test_values_that_are_equal_but_for_rounding_have_an_axis() -> None:
    marks = ticks(2.1, 2.1 + 1e-15)
    assert marks == sorted(set(marks))
    assert len(marks) >= 2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.3, 4, [0.2, 0.5, 1, 2, 5]),
        (1, 1, [1, 2]),
        (1, 10, [1, 2, 5, 10]),
        (0.02, 3000, [0.01, 0.1, 1, 10, 100, 1000, 10000]),
    ],
)
def test_logarithmic_ticks_by_hand(low: float, high: float, expected: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(expected)


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


def lines_of(chart: str, kind: str) -> list[list[tuple[float, float]]]:
    """The points of all polylines or polygons of a chart."""
    return [
        [(float(x), float(y)) for x, y in (p.split(",") for p in line.get("points", "").split())]
        for line in ElementTree.fromstring(chart).iter(f"{SVG}{kind}")
    ]


def test_a_band_goes_there_along_the_highest_and_back_along_the_lowest() -> None:
    chart = line_chart(
        {"": [(0, 1)]}, "x", "y", bands={"raw": [(0, 0, 2), (10, 1, math.nan), (10, 0, 4)]}
    )
    (area,) = lines_of(chart, "polygon")
    assert area == [
        (LEFT, (HEIGHT - BOTTOM + TOP) / 2),
        (WIDTH - RIGHT, TOP),
        (WIDTH - RIGHT, HEIGHT - BOTTOM),
        (LEFT, HEIGHT - BOTTOM),
    ]
    texts = [text.text for text in ElementTree.fromstring(chart).iter(f"{SVG}text")]
    assert "raw" in texts
    assert "" not in texts, "a series of the empty name has no place in the legend"


def test_marks_and_levels_are_drawn_and_the_axes_reach_them() -> None:
    points = [(0, 4), (10, 5)]
    levels = {"": 0, "most": 10}
    chart = line_chart({"a": points}, "x", "y", marks=[20], borders=[0], levels=levels)
    root = ElementTree.fromstring(chart)
    (mark,) = (line for line in root.iter(f"{SVG}line") if line.get("class") == "mark")
    assert float(mark.get("x1", 0)) == WIDTH - RIGHT
    (border,) = (line for line in root.iter(f"{SVG}line") if line.get("class") == "border")
    assert float(border.get("x1", 0)) == LEFT
    (level,) = (
        line
        for line in root.iter(f"{SVG}line")
        if line.get("stroke-dasharray") and line is not border
    )
    assert float(level.get("y1", 0)) == TOP
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"most", "0", "20"} <= set(texts)


def test_on_a_logarithmic_axis_a_factor_is_a_distance_and_zero_has_no_place() -> None:
    points = [(0, 0.1), (1, 1), (2, 10), (3, 0.0), (4, -1)]
    ((_, a), (_, b), (_, c)) = lines_of(
        line_chart({"a": points}, "x", "y", logarithmic=True), "polyline"
    )[0]
    assert (a, b, c) == (HEIGHT - BOTTOM, (HEIGHT - BOTTOM + TOP) / 2, TOP)


def test_a_heat_map_joins_neighbours_of_one_colour() -> None:
    rows = {"0": [(5, 1.0), (10, 1.1), (15, 3.0)], "<1>": [(5, 0.1), (10, 0.1), (15, 0.1)]}
    edges = (0.25, 0.5, 0.8, 1.25, 2, 4)
    chart = heat_map(rows, "step", "expert", edges, steps=5)
    root = ElementTree.fromstring(chart)
    paths = {path.get("fill"): path.get("d", "") for path in root.iter(f"{SVG}path")}
    tall, wide = (HEIGHT - TOP - BOTTOM) / 2, (WIDTH - LEFT - RIGHT) / 15
    assert paths == {
        HEAT[0]: f"M{LEFT:.1f} {TOP + tall:.1f}h{15 * wide:.1f}v{tall:.1f}h{-15 * wide:.1f}z",
        HEAT[3]: f"M{LEFT:.1f} {TOP:.1f}h{10 * wide:.1f}v{tall:.1f}h{-10 * wide:.1f}z",
        HEAT[5]: f"M{LEFT + 10 * wide:.1f} {TOP:.1f}h{5 * wide:.1f}v{tall:.1f}h{-5 * wide:.1f}z",
    }
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"0", "<1>", "under 0.25", "0.8–1.25", "over 4"} <= set(texts)
    ElementTree.fromstring(heat_map({}, "x", "y", edges, 1))
