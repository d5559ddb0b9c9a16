"""Progress of anything long: a bar on a terminal, JSON lines elsewhere, always on stderr."""

from __future__ import annotations

import json
import sys
import time
from types import TracebackType
from typing import Any, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """`with Progress("train", total=100) as p: p.update(10, loss=2.5)`.

    Elsewhere than on a terminal, one JSON object a line, at most one every `interval` seconds and
    always the last: `{"stage", "done", "total", "elapsed_s", "eta_s", ...figures}`. `start` is what
    an earlier process had done. A quiet one says nothing: another process does.
    """

    def __init__(
        self,
        stage: str,
        total: float,
        stream: TextIO | None = None,
        interval: float = 5.0,
        start: int = 0,
        quiet: bool = False,
    ) -> None:
        self.stage, self.total, self.interval, self.start = stage, total, interval, start
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self.started = time.monotonic()
        self._last_line = -interval
        self._pending: dict[str, Any] | None = None
        self._bar: Bar | None = None
        if self.stream.isatty() and not quiet:
            self._bar = Bar(
                TextColumn("{task.description:>12}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[figures]}"),
                console=Console(file=self.stream),
            )
            self._task = self._bar.add_task(stage, total=total, completed=start, figures="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar:
            self._bar.stop()
        elif self._pending:
            self._print(self._pending)

    def update(self, done: float, **figures: Any) -> None:
        """Say that `done` of the total is reached; `figures` are shown beside it."""
        elapsed = time.monotonic() - self.started
        if self._bar:
            text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
            self._bar.update(self._task, completed=done, figures=text)
            return
        self._pending = self._line(done, elapsed) | figures
        if elapsed - self._last_line >= self.interval:
            self._print(self._pending)
            self._last_line = elapsed

    def tell(self, done: float, **figures: Any) -> None:
        """Figures that come seldom, such as an evaluation's: a line of their own, at once."""
        if self._bar:
            text = "  ".join(f"{name} {_short(value)}" for name, value in figures.items())
            self._bar.console.print(f"{done:>12,}  {text}", markup=False, highlight=False)
            return
        pending = self._pending
        self._print(self._line(done, time.monotonic() - self.started) | figures)
        self._pending = pending

    def _line(self, done: float, elapsed: float) -> dict[str, Any]:
        """What every line begins with."""
        here = done - self.start
        eta = elapsed * (self.total - done) / here if here else None
        return {
            "stage": self.stage,
            "done": done,
            "total": self.total,
            "elapsed_s": round(elapsed, 1),
            "eta_s": None if eta is None else round(eta, 1),
        }

    def _print(self, line: dict[str, Any]) -> None:
        if self.quiet:
            return
        self.stream.write(json.dumps(line) + "\n")
        self.stream.flush()
        self._pending = None


def say(message: str, stream: TextIO | None = None) -> None:
    """One line for the person at the terminal, on stderr so that stdout stays clean."""
    out = stream or sys.stderr
    out.write(message + "\n")
    out.flush()


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
