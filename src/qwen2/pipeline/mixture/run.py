"""Which experiment a recipe is of, and its run."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen2.common.config import read_values
from qwen2.common.errors import UserError
from qwen2.pipeline.mixture.experiment import mixture_stages, terminal_summary
from qwen2.pipeline.mixture.recipe import MixtureRecipe, ThresholdRecipe
from qwen2.pipeline.mixture.threshold import threshold_stages, threshold_summary
from qwen2.pipeline.stages import run_stages

EXPERIMENTS = ("mixture", "relaxed_threshold")


def run_experiment(
    path: Path, overrides: Sequence[str], out: Path, workers: int
) -> tuple[dict[str, dict[str, Any]], str]:
    """Run or resume the recipe in `path` in folder `out`; its results, and a screenful of them.

    Raises:
        UserError: there is no such experiment, or the recipe or its run fails.
        Stopped: a signal came, and what was finished is kept.
    """
    values = read_values(path, overrides)
    if "experiment" not in values:
        raise UserError(f"{path}: key 'experiment' is missing; it is {' or '.join(EXPERIMENTS)}")
    name = str(values["experiment"])
    if name not in EXPERIMENTS:
        near = difflib.get_close_matches(name, EXPERIMENTS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(
            f"{path}: unknown experiment {name!r}; {hint}there are {', '.join(EXPERIMENTS)}"
        )
    if name == "mixture":
        recipe = MixtureRecipe.parse(values, str(path))
        run = run_stages(mixture_stages(recipe, workers), out, recipe)
        return run.results, terminal_summary(run)
    relaxed = ThresholdRecipe.parse(values, str(path))
    compared = run_stages(threshold_stages(relaxed, workers), out, relaxed)
    return compared.results, threshold_summary(compared)
