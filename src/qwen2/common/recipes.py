"""Recipes by file or by name: YAML files beside the package's code."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from qwen2.common.errors import UserError


def find_recipe(name: str) -> Path:
    """The file `name`, or the package's recipe of that name, with or without `.yaml`.

    Raises:
        UserError: neither; says which recipes there are.
    """
    if Path(name).is_file():
        return Path(name)
    own = {path.stem: path for path in _own()}
    stem = name.removesuffix(".yaml")
    if stem in own:
        return own[stem]
    near = difflib.get_close_matches(stem, own, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"recipe {name!r}: no such file; {hint}there are {', '.join(sorted(own))}")


def _own() -> list[Path]:
    folder = Path(str(files("qwen2"))) / "recipes"
    return sorted(folder.glob("*.yaml"))
