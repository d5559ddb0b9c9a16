"""Learning-rate schedules: pure functions from step to a factor of the peak learning rate.

Step t of `steps` counts from 0. Warm-up is linear and never 0: factor (t+1)/warmup. The cosine is
that of Loshchilov & Hutter 2017; WSD (warm-up, stable, decay) that of MiniCPM (Hu et al. 2024),
with its decay linear; the inverse square root that of Vaswani et al. 2017 (section 5.3) with 1 at
its peak, and the cool-down of Zhai et al. 2022. The report does not state its schedule.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from qwen2.common.config import Config


def cosine(step: int, steps: int, warmup: int, floor: float) -> float:
    """Warm-up, then half a cosine from 1 to `floor`, which it would reach at step `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min((step - warmup) / max(steps - warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def wsd(step: int, steps: int, warmup: int, decay: int, floor: float) -> float:
    """Warm-up, then 1, and over the last `decay` steps a line to `floor` at step `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    left = max(steps - step, 0)
    return 1.0 if left >= decay else floor + (1 - floor) * left / decay


def linear(step: int, steps: int, warmup: int, floor: float) -> float:
    """Warm-up, then a line from 1 to `floor`, which it would reach at step `steps`."""
    return wsd(step, steps, warmup, max(steps - warmup, 1), floor)


def inverse_sqrt(step: int, steps: int, warmup: int, decay: int, floor: float) -> float:
    """Warm-up, then sqrt(warmup / (t+1)), which does not depend on `steps`.

    Over the last `decay` steps (0: none) that is multiplied by a line from 1 to `floor`.
    """
    if step < warmup:
        return (step + 1) / warmup
    return math.sqrt(warmup / (step + 1)) * (wsd(step, steps, 0, decay, floor) if decay else 1.0)


class Cosine(Config):
    """`cosine`, as a recipe gives it."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(default=0, ge=0)  # steps
    floor: float = Field(default=0.1, ge=0, le=1)  # factor at the end

    def factor(self, step: int, steps: int) -> float:
        """Factor of the peak learning rate for step `step` of `steps`."""
        return cosine(step, steps, self.warmup, self.floor)


class WSD(Config):
    """`wsd`, as a recipe gives it."""

    kind: Literal["wsd"] = "wsd"
    warmup: int = Field(default=0, ge=0)  # steps
    decay: int = Field(gt=0)  # steps
    floor: float = Field(default=0.1, ge=0, le=1)  # factor at the end

    def factor(self, step: int, steps: int) -> float:
        """Factor of the peak learning rate for step `step` of `steps`."""
        return wsd(step, steps, self.warmup, self.decay, self.floor)


class Linear(Config):
    """`linear`, as a recipe gives it."""

    kind: Literal["linear"] = "linear"
    warmup: int = Field(default=0, ge=0)  # steps
    floor: float = Field(default=0.1, ge=0, le=1)  # factor at the end

    def factor(self, step: int, steps: int) -> float:
        """Factor of the peak learning rate for step `step` of `steps`."""
        return linear(step, steps, self.warmup, self.floor)


class InverseSqrt(Config):
    """`inverse_sqrt`, as a recipe gives it."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup: int = Field(gt=0)  # steps; also the curve's unit of time
    decay: int = Field(default=0, ge=0)  # steps of the cool-down
    floor: float = Field(default=0.0, ge=0, le=1)  # what the cool-down leaves of the curve

    def factor(self, step: int, steps: int) -> float:
        """Factor of the peak learning rate for step `step` of `steps`."""
        return inverse_sqrt(step, steps, self.warmup, self.decay, self.floor)


class Constant(Config):
    """Warm-up, then 1, as a recipe gives it."""

    kind: Literal["constant"] = "constant"
    warmup: int = Field(default=0, ge=0)  # steps

    def factor(self, step: int, steps: int) -> float:
        """Factor of the peak learning rate for step `step`, of however many `steps`."""
        return wsd(step, steps, self.warmup, 0, 1.0)


Schedule = Annotated[Cosine | WSD | Linear | InverseSqrt | Constant, Field(discriminator="kind")]
