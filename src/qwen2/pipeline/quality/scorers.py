"""The scorers of a corpus run: the linear classifier, a model's head, and its perplexity.

    scorers = open_scorers(config)
    for scorer in scorers:
        columns |= scorer(texts, languages)

`QualityConfig` is all that goes to a worker process; each opens its own scorers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen2.corpus.quality.calibrate import Calibration
from qwen2.corpus.quality.config import BITS, HEAD, PERPLEXITY, Extent, QualityConfig
from qwen2.corpus.quality.linear import Linear
from qwen2.corpus.quality.scorer import (
    Columns,
    LinearScorer,
    Scorer,
    calibrated,
    with_percentiles,
)
from qwen2.model.hub import load
from qwen2.pipeline.quality.head import Head, check_model
from qwen2.pipeline.quality.reading import Reader


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
