"""Experiments with small proxy models that choose data (report section 3.1).

`qwen2 corpus mixture`: which weights over the kinds of document are best, and whether a relaxed
quality threshold costs anything. Each run is a list of stages in a folder and resumes by itself.
"""

from qwen2.pipeline.mixture.experiment import mixture_stages, terminal_summary
from qwen2.pipeline.mixture.recipe import MixtureRecipe, ThresholdRecipe
from qwen2.pipeline.mixture.run import run_experiment
from qwen2.pipeline.mixture.threshold import threshold_stages

__all__ = [
    "MixtureRecipe",
    "ThresholdRecipe",
    "mixture_stages",
    "run_experiment",
    "terminal_summary",
    "threshold_stages",
]
