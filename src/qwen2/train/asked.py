"""What a recipe asks for, before anything of it is there: its stage, its mesh, its model's shape.

The shape of a recipe that goes on from a model is in the files of that model. To look at such a run
before the one in front of it has ended, `model` beside `init` says what will be there:

    qwen2 plan long_context init=out/7b/model out=out/7b-long model.published=7b
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig
from qwen2.model.hub import load_config
from qwen2.train.long_context import LongContextRecipe
from qwen2.train.mesh import Mesh
from qwen2.train.pretrain import PretrainRecipe, Shape
from qwen2.train.stage import StageRecipe

RECIPES: dict[str, type[PretrainRecipe] | type[LongContextRecipe]] = {
    "pretrain": PretrainRecipe,
    "long_context": LongContextRecipe,
}
"""By the `stage` of a recipe."""


class _Promised(Config):
    """A shape on its own."""

    model: Shape


@dataclass(frozen=True)
class Asked:
    """A recipe, the model that it trains, and the mesh that it names."""

    recipe: StageRecipe
    model: ModelConfig
    mesh: Mesh | None  # None: it says nothing


def stage_of(values: dict[str, Any], where: str, stages: Iterable[str] = RECIPES) -> str:
    """The stage of a recipe's values; one that names none is of pre-training.

    Raises:
        UserError: there is no such stage.
    """
    stage, known = str(values.get("stage", "pretrain")), list(stages)
    if stage not in known:
        near = difflib.get_close_matches(stage, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"{where}: unknown stage {stage!r}; {hint}there are {', '.join(known)}")
    return stage


def read_asked(values: dict[str, Any], where: str) -> Asked:
    """What a recipe's values ask for; `where` names it. Neither data nor tokenizer need be there.

    Raises:
        UserError: the recipe is wrong, or the model that it goes on from is not there and nothing
            says its shape.
    """
    values = dict(values)
    mesh = values.pop("mesh", None)
    recipe_type = RECIPES[stage_of(values, where)]
    promised = values.pop("model", None) if values.get("init") is not None else None
    recipe = recipe_type.parse(values, where)
    return Asked(
        recipe,
        _shape(recipe, promised, where),
        None if mesh is None else Mesh.parse(mesh, f"{where}: mesh"),
    )


def _shape(recipe: StageRecipe, promised: Any, where: str) -> ModelConfig:
    """The shape that is trained, as its stage has it."""
    assert isinstance(recipe, PretrainRecipe | LongContextRecipe)
    if recipe.init is None:
        assert recipe.model is not None
        return recipe.model
    if promised is not None and not Path(recipe.init).exists():
        model = _Promised.parse({"model": promised}, where).model
    else:
        try:
            model = load_config(recipe.init)
        except UserError as error:
            raise UserError(
                f"{error}; before it is there, give its shape beside it, such as "
                "model.published=57b-a14b"
            ) from None
    changes = recipe.changes if isinstance(recipe, LongContextRecipe) else {}
    return model.model_copy(update=changes)
