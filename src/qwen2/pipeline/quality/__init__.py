"""Scorers of quality that need a model, and the training of all of them."""

from qwen2.corpus.quality.config import QualityConfig
from qwen2.pipeline.quality.recipe import QualityRecipe
from qwen2.pipeline.quality.scorers import open_scorers
from qwen2.pipeline.quality.train import train_quality

__all__ = ["QualityConfig", "QualityRecipe", "open_scorers", "train_quality"]
