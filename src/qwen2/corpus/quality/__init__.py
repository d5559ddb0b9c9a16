"""Quality by a classifier: labels, a linear model of hashed words, percentiles of each language."""

from qwen2.corpus.quality.calibrate import Calibration, Quantiles
from qwen2.corpus.quality.labels import Example, LabelSource, TextSource, read_examples
from qwen2.corpus.quality.linear import Linear, LinearConfig

__all__ = [
    "Calibration",
    "Example",
    "LabelSource",
    "Linear",
    "LinearConfig",
    "Quantiles",
    "TextSource",
    "read_examples",
]
