"""What charts stand in: the frame with its legend, scales, and ticks at round numbers."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from html import escape
from typing import Literal

COLOURS = ["#3f6fd8", "#d8743f", "#3fa372", "#a04fc0", "#888888", "#c4407c", "#2fa5b5"]
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 30, 44


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """About `count` round numbers, a step of 1, 2 or 5 times a power of ten, around [low, high]."""
    span = high - low
    if span <= 1e-9 * abs(high):  # equal, but for rounding
        span = abs(high) or 1.0
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 2 - math.floor(math.log10(step))
    return [round(i * step, digits) for i in range(first, max(last, first + 1) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Numbers with 1, 2 or 5 as their digit around [low, high], above 0; else powers of ten."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    digits = (1, 2, 5) if last - first <= 2 else (1,)
    marks = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
    start = max(bisect_right(marks, low * (1 + 1e-9)) - 1, 0)
    stop = max(bisect_left(marks, high * (1 - 1e-9)), start + 1)
    return marks[start : stop + 1]


class Scale:
    """Maps the range of the ticks onto pixels; `by` is what grows evenly."""

    def __init__(
        self,
        marks: Sequence[float],
        start: float,
        stop: float,
        by: Callable[[float], float] = float,
    ) -> None:
        self.by = by
        self.low, self.high = by(marks[0]), by(marks[-1])
        self.start, self.stop = start, stop

    def __call__(self, value: float) -> float:
        share = (self.by(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)


def number(value: float) -> str:
    """A tick as text."""
    if value and abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if value and abs(value) >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:g}"


def x_tick(x: float, text: str, line: bool = True) -> str:
    """A place on the x axis, with a line upwards unless told otherwise."""
    bottom = HEIGHT - BOTTOM
    grid = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}" class="grid"/>'
    label = f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{escape(text)}</text>'
    return (grid if line else "") + label


def y_tick(y: float, text: str) -> str:
    """A height on the y axis."""
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>'
        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>'
    )


def upright_line(x: float, kind: Literal["mark", "border"]) -> str:
    """From the bottom to the top: red for a mark, dashed for the border of two parts."""
    look = {
        "mark": 'stroke="#d33" stroke-width="1.2"',
        "border": 'stroke="var(--ink,#333)" stroke-width=".8" stroke-dasharray="2 3"',
    }
    return (
        f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="{kind}" '
        f"{look[kind]}/>"
    )


def level_line(y: float, name: str) -> str:
    """A dashed line with its name."""
    return (
        f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" '
        'stroke="var(--ink,#333)" stroke-dasharray="5 4"/>'
        f'<text x="{WIDTH - RIGHT - 4}" y="{y - 4:.1f}" text-anchor="end">{escape(name)}</text>'
    )


def frame(
    body: str,
    x_label: str,
    y_label: str,
    names: Sequence[str],
    height: int = HEIGHT,
    colours: Sequence[str] = COLOURS,
) -> str:
    """The whole chart: `body` with labels and a legend; a series of the empty name has none."""
    legend, x = "", float(LEFT)
    for index, name in enumerate(names):
        if not name:
            continue
        legend += (
            f'<rect x="{x:.0f}" y="8" width="10" height="10" '
            f'fill="{colours[index % len(colours)]}"/>'
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
