"""Recipes by file or by name: YAML files beside the package's code."""

from __future__ import annotations

import difflib
from importlib.resources import files
from pathlib import Path

from qwen2.common.errors import UserError


def find_recipe(name: str) -> Path:
    """The file `name`, or the package's recipe of that name (`7b`, `corpus/laptop`).

    Raises:
        UserError: neither; says which recipes there are.
    """
    if Path(name).is_file():
        return Path(name)
    own = dict(_own())
    stem = name.removesuffix(".yaml")
    if stem in own:
        return own[stem]
    near = difflib.get_close_matches(stem, own, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"recipe {name!r}: no such file; {hint}there are {', '.join(sorted(own))}")


def _own() -> list[tuple[str, Path]]:
    folder = Path(str(files("qwen2"))) / "recipes"
    paths = sorted(folder.rglob("*.yaml"))
    return [(path.relative_to(folder).with_suffix("").as_posix(), path) for path in paths]
