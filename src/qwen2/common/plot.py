"""Charts as SVG text, to stand inside a page or alone: lines, areas, dots, bars and heat maps.

Colours come from CSS variables with fallbacks, so that a page can have a dark side.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from html import escape

from qwen2.common.axes import (
    BOTTOM,
    COLOURS,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    frame,
    level_line,
    log_ticks,
    number,
    ticks,
    upright_line,
    x_tick,
    y_tick,
)

Points = Sequence[tuple[float, float]]

MOST_LETTERS = 44  # of a row's name
BAND = "#8f9bb36b"
HEAT = ["#2b4fa8", "#6f93e0", "#b9cbf2", "#8886", "#f3c9a8", "#e08a4f", "#b8451a"]
"""From far too little over what is right (nearly the paper) to far too much."""
VALUE_WIDTH = 24  # of a bar that has room for its number


def line_chart(
    series: Mapping[str, Points],
    x_label: str,
    y_label: str,
    *,
    bands: Mapping[str, Sequence[tuple[float, float, float]]] | None = None,
    marks: Sequence[float] = (),
    borders: Sequence[float] = (),
    levels: Mapping[str, float] | None = None,
    logarithmic: bool = False,
) -> str:
    """Lines of (x, y) points by name; a series of few points is drawn with dots too.

    A series of the empty name has no place in the legend.

    Args:
        bands: areas of (x, lowest, highest), behind the lines.
        marks: places on the x axis with an upright red line.
        borders: places with an upright dashed line.
        levels: dashed lines at a height, by name; that of the empty name only has the axis reach
            so far.
        logarithmic: the y axis; what is not above 0 is left out.
    """
    bands, levels = bands or {}, levels or {}
    drawable = (lambda y: y > 0 and math.isfinite(y)) if logarithmic else math.isfinite
    points = [point for line in series.values() for point in line if drawable(point[1])]
    areas = [[p for p in band if drawable(p[1]) and drawable(p[2])] for band in bands.values()]
    xs = [x for x, _ in points] + [x for area in areas for x, _, _ in area]
    ys = [y for _, y in points] + [y for area in areas for _, *ends in area for y in ends]
    if not xs:
        return frame("", x_label, y_label, [])
    xs, ys = [*xs, *marks, *borders], [*ys, *levels.values()]
    x_ticks = ticks(min(xs), max(xs))
    y_ticks = (log_ticks if logarithmic else ticks)(min(ys), max(ys))
    x_of = Scale(x_ticks, LEFT, WIDTH - RIGHT)
    y_of = Scale(y_ticks, HEIGHT - BOTTOM, TOP, math.log10 if logarithmic else float)
    parts = [x_tick(x_of(x), number(x)) for x in x_ticks]
    parts += [y_tick(y_of(y), number(y)) for y in y_ticks]
    for area in areas:
        around = [(x_of(x), y_of(high)) for x, _, high in area]
        around += [(x_of(x), y_of(low)) for x, low, _ in reversed(area)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in around)
        parts.append(f'<polygon points="{path}" fill="{BAND}" stroke="{BAND}"/>')
    parts += [upright_line(x_of(x), "border") for x in borders]
    parts += [upright_line(x_of(x), "mark") for x in marks]
    for name, level in levels.items():
        if name:
            parts.append(level_line(y_of(level), name))
    for index, line in enumerate(series.values()):
        colour = COLOURS[index % len(COLOURS)]
        places = [(x_of(x), y_of(y)) for x, y in line if drawable(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        if len(places) <= 40:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places
            ]
    names = [*series, *bands]
    colours = [*(COLOURS[i % len(COLOURS)] for i in range(len(series))), BAND]
    return frame("".join(parts), x_label, y_label, names, colours=colours)


def heat_map(
    rows: Mapping[str, Points], x_label: str, y_label: str, edges: Sequence[float], steps: int
) -> str:
    """A row a series, its values as colours: HEAT[i] from edges[i - 1] up to edges[i].

    Args:
        steps: of x, the width of a cell: its x is where it ends.
    """
    xs = [x for row in rows.values() for x, _ in row]
    if not xs:
        return frame("", x_label, y_label, [])
    marks = ticks(0, max(xs))
    x_of = Scale(marks, LEFT, WIDTH - RIGHT)
    tall = (HEIGHT - TOP - BOTTOM) / len(rows)
    cells: list[list[str]] = [[] for _ in HEAT]
    every = -(-len(rows) // 16)
    parts = []
    for place, (name, row) in enumerate(rows.items()):
        y = TOP + tall * place
        if place % every == 0:
            middle = y + tall / 2 + 4
            parts.append(
                f'<text x="{LEFT - 6}" y="{middle:.1f}" text-anchor="end">{escape(name)}</text>'
            )
        runs: list[list[float]] = []  # neighbours of one colour are one area
        for x, value in row:
            level = bisect_right(edges, value)
            if runs and runs[-1][0] == level:
                runs[-1][2] = x
            else:
                runs.append([level, runs[-1][2] if runs else max(x - steps, 0), x])
        for hue, start, stop in runs:
            left, width = x_of(start), x_of(stop) - x_of(start)
            cells[int(hue)].append(f"M{left:.1f} {y:.1f}h{width:.1f}v{tall:.1f}h{-width:.1f}z")
    parts += [
        f'<path d="{"".join(path)}" fill="{colour}" shape-rendering="crispEdges"/>'
        for path, colour in zip(cells, HEAT, strict=True)
        if path
    ]
    parts += [x_tick(x_of(x), number(x), line=False) for x in marks]
    between = [f"{low:g}–{high:g}" for low, high in itertools.pairwise(edges)]
    names = [f"under {edges[0]:g}", *between, f"over {edges[-1]:g}"]
    return frame("".join(parts), x_label, y_label, names, colours=HEAT)


def scatter_chart(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Dots of (x, y) points by name, and the diagonal on which both are equal."""
    values = [v for points in series.values() for point in points for v in point]
    if not values:
        return frame("", x_label, y_label, [])
    marks = ticks(min(values), max(values))
    x_of, y_of = Scale(marks, LEFT, WIDTH - RIGHT), Scale(marks, HEIGHT - BOTTOM, TOP)
    parts = [x_tick(x_of(mark), number(mark)) for mark in marks]
    parts += [y_tick(y_of(mark), number(mark)) for mark in marks]
    low, high = marks[0], marks[-1]
    parts.append(
        f'<line x1="{x_of(low):.1f}" y1="{y_of(low):.1f}" x2="{x_of(high):.1f}" '
        f'y2="{y_of(high):.1f}" stroke="var(--ink,#333)" stroke-dasharray="4 4"/>'
    )
    for index, points in enumerate(series.values()):
        colour = COLOURS[index % len(COLOURS)]
        parts += [
            f'<circle cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="3" fill="{colour}" '
            'fill-opacity="0.75"/>'
            for x, y in points
        ]
    return frame("".join(parts), x_label, y_label, list(series))


def bar_chart(groups: Mapping[str, Mapping[str, float]], y_label: str) -> str:
    """Bars side by side in each group, from zero: {group: {series: value}}."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    highest = max((value for bars in groups.values() for value in bars.values()), default=1.0)
    y_ticks = ticks(0.0, highest)
    y_of = Scale(y_ticks, HEIGHT - BOTTOM, TOP)
    parts = [y_tick(y_of(y), number(y)) for y in y_ticks]
    room = (WIDTH - LEFT - RIGHT) / max(len(groups), 1)
    width = 0.8 * room / max(len(names), 1)
    for place, (group, bars) in enumerate(groups.items()):
        start = LEFT + room * (place + 0.1)
        parts.append(x_tick(LEFT + room * (place + 0.5), group, line=False))
        for name, value in bars.items():
            index = names.index(name)
            x, y = start + width * index, y_of(value)
            parts.append(
                f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 1:.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}" fill="{COLOURS[index % len(COLOURS)]}"/>'
            )
            if width >= VALUE_WIDTH:
                middle = x + width / 2
                parts.append(
                    f'<text x="{middle:.1f}" y="{y - 4:.1f}" class="value">{value:.2f}</text>'
                )
    return frame("".join(parts), "", y_label, names)


def stacked_bars(rows: Mapping[str, Mapping[str, float]], label: str) -> str:
    """One lying bar a row, its series end to end: {row: {series: value}}."""
    names = list(dict.fromkeys(name for bars in rows.values() for name in bars))
    marks = ticks(0.0, max((sum(bars.values()) for bars in rows.values()), default=0.0) or 1.0)
    shown = {
        row: row if len(row) <= MOST_LETTERS else row[: MOST_LETTERS - 1] + "…" for row in rows
    }
    left = max(150, 16 + 7 * max(map(len, shown.values()), default=0))
    height = 24
    bottom = TOP + height * len(rows)
    x_of = Scale(marks, left, WIDTH - RIGHT)
    parts = [
        f'<line x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>'
        f'<text x="{x_of(x):.1f}" y="{bottom + 16}" text-anchor="middle">{number(x)}</text>'
        for x in marks
    ]
    for place, (row, bars) in enumerate(rows.items()):
        y, at = TOP + height * place, 0.0
        parts.append(
            f'<text x="{left - 6}" y="{y + 16}" text-anchor="end">'
            f"{escape(shown[row])}<title>{escape(row)}</title></text>"
        )
        for name, value in bars.items():
            width = x_of(at + value) - x_of(at)
            parts.append(
                f'<rect x="{x_of(at):.1f}" y="{y + 3}" width="{width:.1f}" height="{height - 6}" '
                f'fill="{COLOURS[names.index(name)]}"/>'
            )
            at += value
    return frame("".join(parts), label, "", names, bottom + BOTTOM)


def standalone(chart: str) -> str:
    """`chart` as a file of its own: on white, and without variables, which not all viewers know."""
    plain = re.sub(r"var\(--[\w-]+,([^)]*)\)", r"\1", chart)
    return plain.replace("<style>", '<rect width="100%" height="100%" fill="#fff"/><style>', 1)


def histogram_chart(
    edges: Sequence[float],
    series: Mapping[str, Sequence[float]],
    marks: Sequence[float],
    label: str,
) -> str:
    """Counts between `edges`, the series on top of each other; a dashed line at each of `marks`.

    The bins are drawn equally wide, whatever the distance of their edges.
    """
    bins = len(edges) - 1
    tops = [sum(values[i] for values in series.values()) for i in range(bins)]
    y_ticks = ticks(0.0, max([*tops, 1]))
    y_of = Scale(y_ticks, HEIGHT - BOTTOM, TOP)
    width = (WIDTH - LEFT - RIGHT) / bins
    parts = [y_tick(y_of(y), number(y)) for y in y_ticks]
    parts += [
        x_tick(LEFT + width * i, f"{edges[i]:.3g}", line=False) for i in range(0, bins + 1, 8)
    ]
    below = [0.0] * bins
    for index, values in enumerate(series.values()):
        for i, value in enumerate(values):
            if value:
                top = y_of(below[i] + value)
                parts.append(
                    f'<rect x="{LEFT + width * i + 0.5:.1f}" y="{top:.1f}" '
                    f'width="{width - 1:.1f}" height="{y_of(below[i]) - top:.1f}" '
                    f'fill="{COLOURS[index]}"/>'
                )
                below[i] += value
    for mark in marks:
        place = sum(edge <= mark for edge in edges) - 1
        inside = min(max(place, 0), bins - 1)
        share = (mark - edges[inside]) / (edges[inside + 1] - edges[inside])
        x = LEFT + width * (inside + min(max(share, 0.0), 1.0))
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" '
            'stroke="var(--ink,#333)" stroke-dasharray="5 4" stroke-width="1.5"/>'
        )
    return frame("".join(parts), label, "documents", list(series))
