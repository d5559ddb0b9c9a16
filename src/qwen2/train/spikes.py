"""Loss spikes: what is one, as a recipe sets it.

A run that has been told of `spike` goes back to its newest checkpoint when the loss of a step is
far above those before it, and does not read again what it read since: the data that led there are
left out, as in PaLM's training (Chowdhery et al. 2022, section 5.1). Whether a loss is far above is
judged as OLMo 2 judges it (Team OLMo et al. 2024): by standard deviations over the last steps.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from pydantic import Field

from qwen2.common.config import Config


class SpikeSettings(Config):
    """When a run goes back, and how far it leaves data out."""

    sigma: float = Field(default=6.0, gt=0)  # standard deviations above the mean
    window: int = Field(default=128, gt=1)  # steps that both are of; half of it at least
    skip: int = Field(default=0, ge=0)  # micro-batches of a rank left out beyond those read already
    most: int = Field(default=3, gt=0)  # times in a row to the same checkpoint; then the run ends

    def describe(self, loss: float, before: Sequence[float]) -> str | None:
        """What makes `loss` a spike after the losses `before`; None when it is none."""
        lately = before[-self.window :]
        if len(lately) < max(2, self.window // 2):
            return None
        mean, deviation = statistics.fmean(lately), statistics.pstdev(lately)
        if loss <= mean + self.sigma * deviation:
            return None
        return f"loss {loss:.4f}, {mean:.4f} ± {deviation:.4f} before"
