"""Charts as SVG text, to stand inside a page or alone: lines over x, dots, and grouped bars.

Colours come from CSS variables with fallbacks, so that a page can have a dark side.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

COLOURS = ["#3f6fd8", "#d8743f", "#3fa372", "#a04fc0", "#888888", "#c4407c", "#2fa5b5"]
WIDTH, HEIGHT = 720, 300
MOST_LETTERS = 44  # of a row's name
VALUE_WIDTH = 24  # of a bar that has room for its number
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 30, 44


def line_chart(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Lines of (x, y) points by name; a series of few points is drawn with dots too."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points if math.isfinite(y)]
    if not xs or not ys:
        return _frame("", x_label, y_label, [])
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_of = _scale(x_ticks, LEFT, WIDTH - RIGHT)
    y_of = _scale(y_ticks, HEIGHT - BOTTOM, TOP)
    parts = [_x_tick(x_of(x), _number(x)) for x in x_ticks]
    parts += [_y_tick(y_of(y), _number(y)) for y in y_ticks]
    for index, points in enumerate(series.values()):
        colour = COLOURS[index % len(COLOURS)]
        places = [(x_of(x), y_of(y)) for x, y in points if math.isfinite(y)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        )
        if len(places) <= 40:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places
            ]
    return _frame("".join(parts), x_label, y_label, list(series))


def scatter_chart(series: Mapping[str, Points], x_label: str, y_label: str) -> str:
    """Dots of (x, y) points by name, and the diagonal on which both are equal."""
    values = [v for points in series.values() for point in points for v in point]
    if not values:
        return _frame("", x_label, y_label, [])
    marks = ticks(min(values), max(values))
    x_of, y_of = _scale(marks, LEFT, WIDTH - RIGHT), _scale(marks, HEIGHT - BOTTOM, TOP)
    parts = [_x_tick(x_of(mark), _number(mark)) for mark in marks]
    parts += [_y_tick(y_of(mark), _number(mark)) for mark in marks]
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
    return _frame("".join(parts), x_label, y_label, list(series))


def bar_chart(groups: Mapping[str, Mapping[str, float]], y_label: str) -> str:
    """Bars side by side in each group, from zero: {group: {series: value}}."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    highest = max((value for bars in groups.values() for value in bars.values()), default=1.0)
    y_ticks = ticks(0.0, highest)
    y_of = _scale(y_ticks, HEIGHT - BOTTOM, TOP)
    parts = [_y_tick(y_of(y), _number(y)) for y in y_ticks]
    room = (WIDTH - LEFT - RIGHT) / max(len(groups), 1)
    width = 0.8 * room / max(len(names), 1)
    for place, (group, bars) in enumerate(groups.items()):
        start = LEFT + room * (place + 0.1)
        parts.append(_x_tick(LEFT + room * (place + 0.5), group, line=False))
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
    return _frame("".join(parts), "", y_label, names)


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
    x_of = _scale(marks, left, WIDTH - RIGHT)
    parts = [
        f'<line x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>'
        f'<text x="{x_of(x):.1f}" y="{bottom + 16}" text-anchor="middle">{_number(x)}</text>'
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
    return _frame("".join(parts), label, "", names, bottom + BOTTOM)


def standalone(chart: str) -> str:
    """`chart` as a file of its own: on white, and without variables, which not all viewers know."""
    plain = re.sub(r"var\(--[\w-]+,([^)]*)\)", r"\1", chart)
    return plain.replace("<style>", '<rect width="100%" height="100%" fill="#fff"/><style>', 1)


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers, a step of 1, 2 or 5 times a power of ten, around [low, high]."""
    span = (high - low) or abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]


class _scale:  # noqa: N801 - a function with a memory
    """Maps the range of the ticks onto pixels."""

    def __init__(self, marks: Sequence[float], start: float, stop: float) -> None:
        self.low, self.high = marks[0], marks[-1]
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def _number(value: float) -> str:
    if value and abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if value and abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:g}"


def _x_tick(x: float, text: str, line: bool = True) -> str:
    bottom = HEIGHT - BOTTOM
    grid = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>'
    label = f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>'
    return (grid if line else "") + label


def _y_tick(y: float, text: str) -> str:
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def _frame(
    body: str, x_label: str, y_label: str, names: Sequence[str], height: int = HEIGHT
) -> str:
    legend, x = "", float(LEFT)
    for index, name in enumerate(names):
        legend += (
            f'<rect x="{x:.0f}" y="8" width="10" height="10" '
            f'fill="{COLOURS[index % len(COLOURS)]}"/>'
            f'<text x="{x + 14:.0f}" y="17">{escape(name)}</text>'
        )
        x += 30 + 7 * len(name)
    middle = (TOP + height - BOTTOM) / 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="{escape(y_label or x_label)}" class="chart"><style>'
        ".chart text{font:12px system-ui,sans-serif;fill:var(--ink,#333)}"
        ".chart .value{font-size:10px;text-anchor:middle}"
        ".chart .grid{stroke:var(--line,#ddd);stroke-width:1}"
        f"</style>{body}{legend}"
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{height - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text transform="translate(14 {middle:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text></svg>"
    )


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
    y_of = _scale(y_ticks, HEIGHT - BOTTOM, TOP)
    width = (WIDTH - LEFT - RIGHT) / bins
    parts = [_y_tick(y_of(y), _number(y)) for y in y_ticks]
    parts += [
        _x_tick(LEFT + width * i, f"{edges[i]:.3g}", line=False) for i in range(0, bins + 1, 8)
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
    return _frame("".join(parts), label, "documents", list(series))
