"""The curves of a training run in bounded memory, whatever its length.

Every figure is kept as mean, lowest and highest of buckets of neighbouring steps. When the steps
outgrow the buckets, each two become one. So a point costs the same at step 10 and at step 10
million, nothing that stood out is lost, and the curves depend on the lines alone: read again from
the file after a resume, they are what they were.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Line = Mapping[str, Any]
"""A line of metrics.jsonl."""

POINTS = 1000  # of a curve, at most
EXPERT_POINTS = 120  # columns of the picture of the experts
KEPT_SKIPS = 20  # reasons for passing over a batch that are kept
NOT_CURVES = {"step", "tokens", "expert_share"}


class Curves:
    """Figures by step in at most `limit` buckets (even) of equal width.

    A value that is not finite leaves no trace.
    """

    def __init__(self, limit: int = POINTS) -> None:
        assert limit % 2 == 0
        self.limit = limit
        self.width = 1  # steps of a bucket
        self._names: dict[str, int] = {}  # their columns
        self._steps = np.zeros(limit, dtype=np.int64)  # the last of each bucket
        self._counts = np.zeros((limit, 0), dtype=np.int64)
        self._sums = np.zeros((limit, 0))
        self._lows = np.zeros((limit, 0))
        self._highs = np.zeros((limit, 0))
        self._open = 0  # the bucket that is being filled
        self._rows: list[Mapping[str, float]] = []  # of it
        self._step = 0
        self._settled = True  # nothing came since it was written down

    @property
    def names(self) -> list[str]:
        """The figures that ever came, in this order."""
        return list(self._names)

    def add(self, step: int, figures: Mapping[str, float]) -> None:
        """Take in the figures of a step, which is not before those taken in already."""
        if step // self.width != self._open:
            self._settle()
            self._rows = []
            while step // self.width >= self.limit:
                self._halve()
            self._open = step // self.width
        self._rows.append(figures)
        self._step = step
        self._settled = False
        for name in figures:
            self._names.setdefault(name, len(self._names))

    def mean(self, name: str) -> list[tuple[int, float]]:
        """Points (last step of the bucket, mean of the figure)."""
        if name not in self._names:
            return []
        filled, column = self._filled(name)
        means = self._sums[filled, column] / self._counts[filled, column]
        return list(zip(self._steps[filled].tolist(), means.tolist(), strict=True))

    def band(self, name: str) -> list[tuple[int, float, float]]:
        """Points (last step of the bucket, lowest, highest)."""
        if name not in self._names:
            return []
        filled, column = self._filled(name)
        lows, highs = self._lows[filled, column].tolist(), self._highs[filled, column].tolist()
        return list(zip(self._steps[filled].tolist(), lows, highs, strict=True))

    def _filled(self, name: str) -> tuple[NDArray[np.intp], int]:
        """Buckets that have values of a figure, and its column."""
        self._settle()
        column = self._names[name]
        return np.flatnonzero(self._counts[:, column]), column

    def _settle(self) -> None:
        """Write down the open bucket as it is: all of it at once, which is cheap."""
        if self._settled:
            return
        self._settled = True
        self._widen()
        values = [[row.get(name, np.nan) for name in self._names] for row in self._rows]
        rows = np.array(values, dtype=np.float64)  # (rows, figures)
        finite = np.isfinite(rows)
        self._steps[self._open] = self._step
        self._counts[self._open] = finite.sum(0)
        self._sums[self._open] = rows.sum(0, where=finite)
        self._lows[self._open] = rows.min(0, where=finite, initial=np.inf)
        self._highs[self._open] = rows.max(0, where=finite, initial=-np.inf)

    def _widen(self) -> None:
        """Columns for figures that are new."""
        if new := len(self._names) - self._counts.shape[1]:
            beside = (self.limit, new)
            self._counts = np.hstack([self._counts, np.zeros(beside, dtype=np.int64)])
            self._sums = np.hstack([self._sums, np.zeros(beside)])
            self._lows = np.hstack([self._lows, np.full(beside, np.inf)])
            self._highs = np.hstack([self._highs, np.full(beside, -np.inf)])

    def _halve(self) -> None:
        """Each two buckets become one."""
        self.width *= 2
        half = self.limit // 2
        for array, join, nothing in (
            (self._steps, np.maximum, 0),
            (self._counts, np.add, 0),
            (self._sums, np.add, 0),
            (self._lows, np.minimum, np.inf),
            (self._highs, np.maximum, -np.inf),
        ):
            array[:half] = join(array[0::2], array[1::2])
            array[half:] = nothing


class History:
    """What metrics.jsonl of a run of `steps` says, as curves; a line at a time."""

    def __init__(self, steps: int) -> None:
        self.figures = Curves()
        """All numbers of the lines of steps, `smooth` (the loss), and `skipped`."""
        self.shares = Curves(EXPERT_POINTS)
        """Share of each expert, by its number."""
        self.held_out = Curves()
        """Evaluations; the names of nested ones are joined by a blank."""
        self.evaluations: list[tuple[int, dict[str, float]]] = []
        """First and last evaluation with their steps."""
        self.skips: deque[tuple[int, str]] = deque(maxlen=KEPT_SKIPS)
        """The last batches passed over: the step before, and why."""
        self.skipped = 0
        self.returns: list[tuple[int, str]] = []
        """Each time that the run went back: to which step, and why."""
        self.last: Line = {}
        """The line of the last step."""
        self.seconds = 0.0
        """Time in steps, by their tokens per second."""
        self.span = min(max(steps // 100, 10), 1000)
        """Steps that the smoothed loss looks back on, late in the run; a tenth of those so far at
        its beginning, where the loss falls fast."""
        self.smooth = math.nan
        """The smoothed loss."""

    def read(self, path: Path) -> None:
        """Take in all lines of a metrics file."""
        with path.open("rb") as file:
            for line in file:
                self.add(json.loads(line))

    def add(self, line: Line) -> None:
        """Take in a line."""
        step = int(line["step"])
        if "loss" in line:
            tokens = line["tokens"] - self.last.get("tokens", 0)
            self.seconds += tokens / (line["tokens_per_s"] or math.inf)
            self.last = line
            figures = {
                name: value
                for name, value in line.items()
                if isinstance(value, int | float) and name not in NOT_CURVES
            }
            self.figures.add(step, figures | {"smooth": self._smooth(step, line["loss"])})
            if "expert_share" in line:
                shares = {str(expert): share for expert, share in enumerate(line["expert_share"])}
                self.shares.add(step, shares)
        if "skipped" in line:
            self.skipped += 1
            self.skips.append((step, str(line["skipped"])))
            self.figures.add(step, {"skipped": 1.0})
        if "rolled_back" in line:
            self.returns.append((step, str(line["rolled_back"])))
            self.last = {**self.last, "step": step, "tokens": line["tokens"]}
        if "evaluation" in line and (found := flatten(line["evaluation"])):
            self.held_out.add(step, found)
            self.evaluations = [*self.evaluations[:1], (step, found)]

    def _smooth(self, step: int, loss: float) -> float:
        """The exponential moving average of the losses."""
        if math.isnan(self.smooth):
            self.smooth = loss
        elif math.isfinite(loss):
            self.smooth += (loss - self.smooth) / min(self.span, 1 + step / 10)
        return self.smooth


def flatten(figures: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The numbers of a nested mapping, their names joined by a blank."""
    flat: dict[str, float] = {}
    for name, value in figures.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{before}{name} ")
        elif isinstance(value, int | float):
            flat[f"{before}{name}"] = value
    return flat
