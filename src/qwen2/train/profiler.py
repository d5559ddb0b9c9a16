"""A trace of some steps: where their time goes.

    trace-00000010.json.gz    every operator, for chrome://tracing or ui.perfetto.dev
    trace-00000010.txt        the operators by their own time

The number is that of the first step. What an evaluation or a checkpoint between the steps does is
in it too.
"""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field
from torch.profiler import ProfilerActivity, profile

from qwen2.common.config import Config
from qwen2.common.files import durable_write
from qwen2.common.progress import say
from qwen2.train.curves import Line
from qwen2.train.metrics import State

ROWS = 60  # of the table


class ProfileSettings(Config):
    """Which steps are traced, counted from 1; the first ones are not like the others."""

    step: int = Field(default=10, gt=0)
    steps: int = Field(default=2, gt=0, le=100)  # a trace takes megabytes a step


class Profiler:
    """Traces the steps of `settings` in a run that has `step` of `steps` behind it."""

    def __init__(
        self, settings: ProfileSettings, out: Path, step: int, steps: int, device: torch.device
    ) -> None:
        self.first, self.last = settings.step, settings.step + settings.steps - 1
        self.out, self.device = out, device
        self._profile: profile | None = None
        if step < steps and not step < self.first <= steps:
            say(f"profile.step {self.first}: this run does steps {step + 1} to {steps}; no trace")
        self._begin_after(step)

    def write(self, line: Line) -> None:
        """Begin after the step before the first, end after the last."""
        if "loss" not in line:
            return
        if self._profile is not None and line["step"] >= self.last:
            self._end()
        self._begin_after(line["step"])

    def close(self, state: State, reason: str = "") -> None:
        """A run that ends in the middle leaves a trace of what it did."""
        if self._profile is not None:
            self._end()

    def _begin_after(self, step: int) -> None:
        if step == self.first - 1:
            activities = [ProfilerActivity.CPU]
            if self.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def _end(self) -> None:
        assert self._profile is not None
        self._profile.stop()
        path = self.out / f"trace-{self.first:08d}.json.gz"
        partial = self.out / f".{path.stem}.partial.gz"  # the profiler goes by the end of the name
        self._profile.export_chrome_trace(str(partial))
        partial.replace(path)
        by = "self_cpu_time_total" if self.device.type == "cpu" else "self_device_time_total"
        table = self._profile.key_averages().table(sort_by=by, row_limit=ROWS)
        durable_write(self.out / f"trace-{self.first:08d}.txt", table.encode())
        say(f"trace of steps {self.first} to {self.last}: {path}")
        self._profile = None
