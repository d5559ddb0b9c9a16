"""Training recipes by their `stage`: what `qwen2 train` runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen2.common.config import read_values
from qwen2.pipeline.long_context import run_long_context
from qwen2.train.asked import stage_of
from qwen2.train.long_context import LongContextRecipe
from qwen2.train.pretrain import PretrainRecipe, pretrain
from qwen2.train.stage import StageResult

STAGES: dict[str, Callable[[dict[str, Any], str], StageResult]] = {
    "pretrain": lambda values, where: pretrain(PretrainRecipe.parse(values, where)),
    "long_context": lambda values, where: run_long_context(LongContextRecipe.parse(values, where)),
}
"""What runs the recipe of a stage, given its values and the name of its file."""


def run_recipe(path: Path, overrides: Sequence[str] = ()) -> StageResult:
    """Run or resume the recipe in `path`; one without a `stage` is of pre-training.

    Raises:
        UserError: there is no such stage, or the recipe or its run fails.
    """
    values = read_values(path, overrides)
    stage = stage_of(values, str(path), STAGES)
    return STAGES[stage](values, str(path))
