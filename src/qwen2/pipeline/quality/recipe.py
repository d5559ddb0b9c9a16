"""The recipe of a training of quality scorers."""

from __future__ import annotations

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from qwen2.common.config import Config
from qwen2.corpus.quality.calibrate import LEAST
from qwen2.corpus.quality.config import Extent
from qwen2.corpus.quality.labels import LabelSource, TextSource
from qwen2.corpus.quality.linear import LinearConfig
from qwen2.pipeline.quality.head import HeadConfig
from qwen2.pipeline.quality.judges import JudgeConfig


class ModelReading(Config):
    """A model, and how much of a document it reads."""

    model: str
    """MODEL as every command takes it."""
    extent: Extent = Extent()


class HeadTraining(ModelReading):
    """A head on a frozen model."""

    head: HeadConfig = HeadConfig()


class QualityRecipe(Config):
    """What is learned from, and what is trained."""

    labels: tuple[LabelSource, ...] = ()
    judge: JudgeConfig | None = None
    """Its scores are labels too, before those of `labels` where a text is in both."""
    reference: tuple[TextSource, ...] = ()
    """A sample of the corpus to be filtered, for percentiles; none: the held-out labelled texts."""
    least: PositiveInt = LEAST
    """Documents of a language in the sample for percentiles of its own."""
    held_out: float = Field(default=0.2, gt=0, lt=1)
    seed: int = 0
    linear: LinearConfig = LinearConfig()
    head: HeadTraining | None = None
    perplexity: ModelReading | None = None
    dtype: str = "auto"
    device: str = "auto"

    @model_validator(mode="after")
    def _has_labels(self) -> Self:
        if not self.labels and self.judge is None:
            raise ValueError("nothing to learn from: give labels, a judge, or both")
        return self
