"""Phases: a run whose batches, context or rotations change at given steps.

    phases:
      - {steps: 1000}
      - {steps: 200, context: 32768, rows: 1, rope_theta: 1.0e+6}

What a phase does not say stays as it was before it; for the first, as the recipe has it. Only the
schedule does not stay: that of the recipe runs over all phases without one of their own, as if
there were no others. A run without phases is a run of one.

The data go on from phase to phase. Where only rows or accumulation change, the next row is the one
after the last. Where context or weights change, so that documents are cut into other rows, the
phases have documents of their own, see tokens/share_out.py.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import Field

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig
from qwen2.tokens.loader import PackedLoader
from qwen2.tokens.packing import PackedBatch
from qwen2.train.schedules import Schedule


class Phase(Config):
    """A phase, as a recipe gives it: its length, and what changes at its start."""

    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)  # instead of steps
    context: int | None = Field(default=None, gt=1)
    rows: int | None = Field(default=None, gt=0)
    accumulation: int | None = Field(default=None, gt=0)
    rope_theta: float | None = Field(default=None, gt=0)
    weights: dict[str, float] | None = None
    schedule: Schedule | None = None  # over this phase alone


@dataclass(frozen=True)
class Stretch:
    """A phase with everything that it does not say filled in."""

    first: int
    """Its first step, counted from 0."""
    steps: int
    context: int
    rows: int
    accumulation: int
    rope_theta: float | None = None
    """None: what the model has at first."""
    weights: dict[str, float] | None = None
    schedule: Schedule | None = None
    """None: the recipe's."""

    @property
    def step_tokens(self) -> int:
        """Tokens of one update, padding too."""
        return self.context * self.step_rows

    @property
    def step_rows(self) -> int:
        """Rows of one update."""
        return self.rows * self.accumulation

    def shared(self, ranks: int, stages: int = 1) -> Stretch:
        """This as one of `ranks` has it: as many tokens in a step of all, in the fewest batches
        that are at least one for each of `stages`, of a pipeline.

        Raises:
            UserError: a step has not rows enough, or not as many for each.
        """
        total = self.step_rows
        if total % ranks:
            raise UserError(
                f"a step has rows x accumulation = {self.rows} x {self.accumulation} rows, which "
                f"{ranks} ranks cannot share evenly; give a multiple of {ranks}"
            )
        own = total // ranks
        if own < stages:
            raise UserError(
                f"a step has rows x accumulation = {total} rows, {own} for each rank, too few for "
                f"the {stages} stages of the mesh's pp; give a larger accumulation"
            )
        most = min(self.rows, own // stages)
        rows = max(n for n in range(1, most + 1) if own % n == 0)
        return replace(self, rows=rows, accumulation=own // rows)

    def lasting(self, steps: int | None, tokens: int | None) -> Stretch:
        """With its length; a budget of tokens is rounded up to steps.

        Raises:
            ValueError: it is not one of both.
        """
        if (steps is None) == (tokens is None):
            raise ValueError("give either steps or tokens")
        return replace(self, steps=steps or -(-(tokens or 0) // self.step_tokens))


def lay_out(before: Stretch, phases: Sequence[Phase]) -> list[Stretch]:
    """`phases` one after the other; `before` has what the first does not say.

    Raises:
        ValueError: one has no length; says which.
    """
    plan: list[Stretch] = []
    for number, phase in enumerate(phases):
        kept = replace(before, first=before.first + before.steps, schedule=phase.schedule)
        names = ("context", "rows", "accumulation", "rope_theta", "weights")
        said = {name: value for name in names if (value := getattr(phase, name)) is not None}
        try:
            before = replace(kept, **said).lasting(phase.steps, phase.tokens)
        except ValueError as error:
            raise ValueError(f"phases.{number}: {error}") from None
        plan.append(before)
    return plan


def phase_at(plan: Sequence[Stretch], step: int) -> int:
    """The phase that a step is in; the last one for a step after the end."""
    return max(number for number, stretch in enumerate(plan) if stretch.first <= step)


def factor_at(plan: Sequence[Stretch], schedule: Schedule, step: int) -> float:
    """Factor of the peak learning rate; `schedule` is that of phases without their own."""
    here = plan[phase_at(plan, step)]
    within = step - here.first
    if here.schedule is not None:
        return here.schedule.factor(within, here.steps)
    common = [stretch for stretch in plan if stretch.schedule is None]
    passed = sum(stretch.steps for stretch in common if stretch.first < here.first)
    return schedule.factor(passed + within, sum(stretch.steps for stretch in common))


def config_of_phase(config: ModelConfig, plan: Sequence[Stretch], number: int) -> ModelConfig:
    """What `config`, the model's at first, is in a phase.

    The base of the rotations is the phase's; and where a context up to here is longer than the
    model's, that is its length. YARN and dual chunks go with that: they stand in for what is learnt
    here.
    """
    changes: dict[str, Any] = {}
    if (theta := plan[number].rope_theta) is not None:
        changes["rope_theta"] = theta
    longest = max(stretch.context for stretch in plan[: number + 1])
    if longest > config.max_position_embeddings:
        changes |= {"max_position_embeddings": longest, "yarn": None, "dual_chunk": None}
    return config.model_copy(update=changes)


def cuts(plan: Sequence[Stretch]) -> list[list[int]]:
    """Phases, one after the other, whose documents are cut into the same rows."""
    groups: list[list[int]] = []
    for number, here in enumerate(plan):
        last = plan[number - 1]
        if number and (here.context, here.weights) == (last.context, last.weights):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


class PhasedLoader:
    """Endless iterator over the batches of the phases of `plan`.

    Args:
        loaders: one for each group of `cuts(plan)`, at its beginning.
    """

    def __init__(self, plan: Sequence[Stretch], loaders: Sequence[PackedLoader]) -> None:
        self.plan = plan
        self._loaders = dict(zip((group[0] for group in cuts(plan)), loaders, strict=True))
        self.phase = 0
        self.current = self._opened(0)

    def enter(self, phase: int) -> None:
        """Go on to a phase, if it is not this one; there is no way back."""
        assert phase >= self.phase, "data are not read again"
        while self.phase < phase:
            self.phase += 1
            row = self.current.row
            self.current = self._opened(self.phase)
            if self.phase not in self._loaders:
                self.current.row = row

    def before_step(self, step: int) -> list[PackedLoader]:
        """Loaders that stand before each batch of a step, counted from 0, if none is skipped."""
        phase = phase_at(self.plan, step)
        first = max(number for number in self._loaders if number <= phase)
        batches = [(s.steps * s.accumulation, s.rows) for s in self.plan[first:phase]]
        here = self.plan[phase]
        found = []
        for batch in range(here.accumulation):
            loader = self._opened(phase)
            passed = (step - here.first) * here.accumulation + batch
            rows = sum(count * rows for count, rows in [*batches, (passed, here.rows)])
            loader.row = rows * loader.world_size
            found.append(loader)
        return found

    def __next__(self) -> PackedBatch:
        return next(self.current)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to continue; the same on all ranks."""
        return {"phase": self.phase, **self.current.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state` was taken.

        Raises:
            UserError: it was taken with other data, see `PackedLoader`.
        """
        self.phase = int(state.get("phase", 0))  # there were no phases once
        self.current = self._opened(self.phase)
        self.current.load_state_dict(state)

    def _opened(self, phase: int) -> PackedLoader:
        """The loader of a phase at the beginning of its documents."""
        first = max(number for number in self._loaders if number <= phase)
        loader = copy.copy(self._loaders[first])
        loader.rows = self.plan[phase].rows
        return loader
