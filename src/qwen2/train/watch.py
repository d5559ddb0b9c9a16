"""Who looks on while a run goes: each gets every line of the metrics, and is told how it ends.

metrics.jsonl       the lines themselves (metrics.py)
run.html            the page (page.py)
tensorboard/        when the recipe says `tensorboard: true` (tensorboard.py)
trace-*.json.gz     when it says `profile` (profiler.py)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from qwen2.common.config import Config, one_line
from qwen2.common.errors import UserError
from qwen2.train.metrics import MetricsFile, State
from qwen2.train.page import Page
from qwen2.train.profiler import Profiler, ProfileSettings
from qwen2.train.tensorboard import TensorBoard


class WatchSettings(Config):
    """What of a recipe decides who looks on, beside the log and the page."""

    tensorboard: bool = False
    profile: ProfileSettings | None = None


class Watcher(Protocol):
    """One that looks on."""

    def write(self, line: dict[str, Any], /) -> None:
        """A line of the metrics."""

    def close(self, state: State, reason: str, /) -> None:
        """The run ended so; `reason` is why it failed."""


class Watchers:
    """All of them, in the order in which they hear of things; told of the end by `with`.

    The run failed when an exception ends the block, was stopped after `stop()`, and else finished.
    """

    def __init__(self, watchers: Sequence[Watcher]) -> None:
        self._watchers = watchers
        self._state: State = "finished"

    def write(self, line: dict[str, Any]) -> None:
        """Pass on a line."""
        for watcher in self._watchers:
            watcher.write(line)

    def stop(self) -> None:
        """It ends before its last step."""
        self._state = "stopped"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        reason = ""
        if error is not None:
            self._state = "failed"
            said, name = one_line(error), type(error).__name__
            reason = said if isinstance(error, UserError) else f"{name}: {said}".rstrip(": ")
        troubles = []
        for watcher in self._watchers:
            try:  # the next one is told, whatever becomes of this
                watcher.close(self._state, reason)
            except Exception as trouble:
                troubles.append(trouble)
        if troubles and error is None:
            raise troubles[0]


def watch(
    settings: WatchSettings,
    metrics: MetricsFile,
    out: Path,
    stage: str,
    step: int,
    steps: int,
    device: torch.device,
) -> Watchers:
    """All that look on at a run in `out`, of which `step` of `steps` steps are done."""
    recipe = settings.model_dump(mode="json")
    watchers: list[Watcher] = [metrics, Page(out, metrics.path, stage, steps, recipe)]
    if settings.tensorboard:
        watchers.append(TensorBoard(out / "tensorboard", step))
    if settings.profile is not None:
        watchers.append(Profiler(settings.profile, out, step, steps, device))
    return Watchers(watchers)
