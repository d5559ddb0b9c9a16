"""Which scorers a corpus run asks, as data: it goes to the workers, which open them themselves.

No model is imported here; `pipeline.quality.open_scorers` does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, PositiveInt, model_validator

from qwen2.common.config import Config

QUALITY, HEAD, PERPLEXITY, BITS = "quality", "head", "perplexity", "bits_per_byte"


class Extent(Config):
    """How much of a document a model reads."""

    tokens: PositiveInt | None = 1024
    """The first so many; None: all of it."""
    context: int = Field(default=2048, ge=2)
    """Tokens of a window."""


class QualityConfig(Config):
    """Which scorers there are, and where what they were trained to lies."""

    linear: Path | None = None
    """Folder of a linear classifier."""
    head: Path | None = None
    """Folder of a head."""
    head_model: str | None = None
    """The model that it was trained on: MODEL as every command takes it."""
    perplexity_model: str | None = None
    perplexity_extent: Extent = Extent()
    """How much of a document is predicted; a head has its own."""
    calibration: Path | None = None
    """Percentiles of each language; None: raw scores alone."""
    dtype: str = "auto"
    device: str = "auto"

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.head is None) != (self.head_model is None):
            raise ValueError("head and head_model belong together: give both or neither")
        if not (self.linear or self.head or self.perplexity_model):
            raise ValueError("no scorer: give linear, head, or perplexity_model")
        return self

    @property
    def scores(self) -> tuple[str, ...]:
        """Names of the raw scores."""
        return (
            *((QUALITY,) if self.linear else ()),
            *((HEAD,) if self.head else ()),
            *((PERPLEXITY, BITS) if self.perplexity_model else ()),
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all columns that the scorers give, in their order."""
        if self.calibration is None:
            return self.scores
        return tuple(c for name in self.scores for c in (name, f"{name}_percentile"))
