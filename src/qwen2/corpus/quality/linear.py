"""The cheap classifier of quality: a logistic regression over hashed words and pairs of words.

Does the bulk of model-based filtering (report section 3.1), as fastText does elsewhere: the score
of a text is the logistic function of its features' mean weight. A text is read once at tens of MB a
second; the whole model is one table of 2^bits weights.

Trained by AdaGrad (Duchi et al. 2011), whose steps do not depend on how rare a feature is. Labels
may be soft: a judge's score of 0 to 5 over 5 is a target as good as yes and no.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt
from safetensors.numpy import save_file

from qwen2.common.config import Config
from qwen2.common.files import durable_folder
from qwen2.corpus.filters.words import segment_sums
from qwen2.corpus.quality.features import feature_batches
from qwen2.corpus.quality.files import read_json, read_tensors

CONFIG, WEIGHTS = "config.json", "weights.safetensors"

TINY = 1e-30  # a weight whose slopes have all been nought stays
Floats = NDArray[np.float32]


class LinearConfig(Config):
    """The size of a classifier and how it is trained."""

    bits: int = Field(default=20, ge=8, le=28)
    """The table has 2^bits weights; features that fall on one slot share its weight."""
    epochs: PositiveInt = 5
    rate: PositiveFloat = 3.0
    """Of AdaGrad: about how far the first step moves a logit."""
    batch: PositiveInt = 32
    """Texts of a step."""
    seed: int = 0
    """Of the order of the texts."""


class Linear:
    """A trained classifier.

    `weights` (2^bits,) in fp32 and `bias` are in nats: a text's logit is the bias and the mean
    weight of its features.
    """

    def __init__(self, config: LinearConfig, weights: Floats, bias: float) -> None:
        assert weights.shape == (1 << config.bits,)
        self.config, self.weights, self.bias = config, weights, bias

    @classmethod
    def fit(
        cls,
        texts: Sequence[str],
        targets: NDArray[np.float64],
        importance: NDArray[np.float64] | None = None,
        config: LinearConfig = LinearConfig(),  # noqa: B008
    ) -> Self:
        """Fit a classifier. The same arguments give the same weights.

        Args:
            targets: (texts,) from 0, bad, to 1, good.
            importance: (texts,) how much each counts, 1 on average; see `labels.balance`.
        """
        if importance is None:
            importance = np.ones(len(texts))
        examples = _Examples(texts, config.bits)
        weights = np.zeros(1 << config.bits)
        squares = np.zeros(1 << config.bits)
        bias = bias_squares = 0.0
        order = np.random.default_rng(config.seed)
        for _ in range(config.epochs):
            shuffled = order.permutation(len(texts))
            for start in range(0, len(texts), config.batch):
                chosen = shuffled[start : start + config.batch]
                slots, values, bounds = examples.batch(chosen)
                logits = bias + segment_sums(weights[slots] * values, bounds)
                errors = (sigmoid(logits) - targets[chosen]) * importance[chosen] / len(chosen)
                used, places = np.unique(slots, return_inverse=True)
                slope = np.bincount(places, np.repeat(errors, np.diff(bounds)) * values, len(used))
                squares[used] += slope**2
                weights[used] -= config.rate * slope / np.sqrt(squares[used] + TINY)
                bias_squares += errors.sum() ** 2
                bias -= config.rate * errors.sum() / np.sqrt(bias_squares + TINY)
        return cls(config, weights.astype(np.float32), float(bias))

    def scores(self, texts: Sequence[str]) -> Floats:
        """How good each text is, (texts,) from 0 to 1; without words the bias decides."""
        return sigmoid(self.logits(texts)).astype(np.float32)

    def logits(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """(texts,) in nats; the same whatever texts are beside."""
        found = np.empty(len(texts))
        for part, batch in feature_batches(texts, self.config.bits):
            weights = self.weights[batch.slots].astype(np.float64)
            sums = segment_sums(weights[: batch.tokens[-1]], batch.tokens)
            sums += segment_sums(weights[batch.tokens[-1] :], batch.pairs)
            found[part] = self.bias + sums / np.maximum(batch.counts, 1)
        return found

    def save(self, folder: Path) -> None:
        """Write config.json and weights.safetensors into the new folder `folder`, durably.

        Raises:
            UserError: `folder` exists or cannot be written.
        """
        with durable_folder(folder) as partial:
            (partial / CONFIG).write_text(self.config.model_dump_json(indent=1) + "\n")
            tensors = {"weights": self.weights, "bias": np.array([self.bias])}
            save_file(tensors, partial / WEIGHTS)

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The classifier in `folder`.

        Raises:
            UserError: it is missing, damaged, or its files are not of one classifier.
        """
        config = LinearConfig.parse(read_json(folder / CONFIG), str(folder / CONFIG))
        tensors = read_tensors(folder / WEIGHTS, {"weights": (1 << config.bits,), "bias": (1,)})
        return cls(config, tensors["weights"].astype(np.float32), float(tensors["bias"][0]))


class _Examples:
    """Features of the texts of a training, as numbers of their slots: 8 bytes each."""

    def __init__(self, texts: Sequence[str], bits: int) -> None:
        slots: list[NDArray[np.int32]] = []
        values: list[Floats] = []
        for _, batch in feature_batches(texts, bits):
            for index in range(len(batch.counts)):
                found, counts = np.unique(batch.of_text(index), return_counts=True)
                slots.append(found.astype(np.int32))
                values.append((counts / max(counts.sum(), 1)).astype(np.float32))
        self.slots, self.values = slots, values

    def batch(
        self, chosen: NDArray[np.int64]
    ) -> tuple[NDArray[np.int32], NDArray[np.float64], NDArray[np.int64]]:
        """Slots and shares of the features of some texts, flat, and where each text begins."""
        sizes = [len(self.slots[index]) for index in chosen]
        slots = np.concatenate([self.slots[index] for index in chosen])
        values = np.concatenate([self.values[index] for index in chosen]).astype(np.float64)
        return slots, values, np.concatenate([[0], np.cumsum(sizes)])


def sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (1 + e^-x), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * logits))
