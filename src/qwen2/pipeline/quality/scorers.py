"""The scorers of a corpus run: the linear classifier, a model's head, and its perplexity.

    scorers = open_scorers(config)
    for scorer in scorers:
        columns |= scorer(texts, languages)

`QualityConfig` is all that goes to a worker process; each opens its own scorers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from pydantic import model_validator

from qwen2.common.config import Config
from qwen2.corpus.quality.calibrate import Calibration
from qwen2.corpus.quality.linear import Linear
from qwen2.corpus.quality.scorer import (
    QUALITY,
    Columns,
    LinearScorer,
    Scorer,
    calibrated,
    with_percentiles,
)
from qwen2.model.hub import load
from qwen2.pipeline.quality.head import Head, check_model
from qwen2.pipeline.quality.reading import Extent, Reader

HEAD, PERPLEXITY, BITS = "head", "perplexity", "bits_per_byte"


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


class ModelScorer:
    """`head`, `perplexity` and `bits_per_byte` of one model, whichever are wanted, by one pass."""

    def __init__(
        self,
        reader: Reader,
        head: Head | None,
        perplexity: bool,
        calibration: Calibration | None = None,
    ) -> None:
        self.reader, self.head, self.perplexity = reader, head, perplexity
        self.calibration = calibration
        names = (*((HEAD,) if head else ()), *((PERPLEXITY, BITS) if perplexity else ()))
        self.columns = with_percentiles(names, calibration)

    def __call__(self, texts: Sequence[str], languages: Sequence[str]) -> Columns:
        """See `Scorer`; an empty text has none of these numbers."""
        readings = self.reader.read(texts, loss=self.perplexity)
        found: Columns = {}
        if self.head is not None:
            scores = self.head.scores(readings.pooled)
            found[HEAD] = np.where(readings.tokens > 0, scores, np.nan)
        if self.perplexity:
            found |= {PERPLEXITY: readings.perplexity, BITS: readings.bits_per_byte}
        return calibrated(found, languages, self.calibration)


def open_scorers(config: QualityConfig) -> list[Scorer]:
    """The scorers of `config`, cheapest first; a model that serves for two is loaded once.

    Raises:
        UserError: something that it names is missing, damaged, or does not belong together.
    """
    calibration = Calibration.load(config.calibration) if config.calibration else None
    scorers: list[Scorer] = []
    if config.linear is not None:
        scorers.append(LinearScorer(Linear.load(config.linear), calibration))
    if config.head is not None:
        assert config.head_model is not None
        head, identity = Head.load(config.head)
        check_model(config.head, identity, config.head_model)
        shared = (config.perplexity_model, config.perplexity_extent) == (
            config.head_model,
            identity.extent,
        )
        reader = open_reader(config.head_model, identity.extent, config)
        scorers.append(ModelScorer(reader, head, shared, calibration))
        if shared:
            return scorers
    if config.perplexity_model is not None:
        if config.perplexity_model == config.head_model:
            reader = Reader(reader.model, reader.tokenizer, config.perplexity_extent)
        else:
            reader = open_reader(config.perplexity_model, config.perplexity_extent, config)
        scorers.append(ModelScorer(reader, None, True, calibration))
    return scorers


def open_reader(model: str, extent: Extent, config: QualityConfig) -> Reader:
    """A model for inference that reads `extent` of each document.

    Raises:
        UserError: there is no such model.
    """
    return Reader(*load(model, dtype=config.dtype, device=config.device, inference=True), extent)
