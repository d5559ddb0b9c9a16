"""A run as a list of stages: each one leaves its result, and a second start goes on after it."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.common.files import durable_write, remove_leftovers
from qwen2.common.memory import release_freed_memory
from qwen2.common.progress import say

RECIPE = "recipe.yaml"
RESULTS = "stages"

C = TypeVar("C", bound=Config)


class Stopped(Exception):  # noqa: N818 - not an error
    """A stage was asked to stop, and has saved what it had; the run can be taken up again."""


@dataclass
class Run(Generic[C]):
    """What a stage is given: the recipe, the folder, and the results of the stages before it."""

    folder: Path
    recipe: C
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Working time of the finished stages, over all starts."""
        return sum(float(result["seconds"]) for result in self.results.values())


@dataclass(frozen=True)
class Stage(Generic[C]):
    """One step of a run. `work` returns figures that JSON can hold; files go into the folder.

    A stage that is cut short is run again from its beginning: the folder that it `makes` is removed
    before. One that makes none finds by itself where it was.
    """

    name: str
    title: str
    work: Callable[[Run[C]], dict[str, Any]]
    makes: str | None = None


def run_stages(
    stages: Sequence[Stage[C]], folder: Path, recipe: C, *, same_recipe: bool = True
) -> Run[C]:
    """Run what has no result yet, in order; the results of all stages.

    Args:
        same_recipe: whether the folder is for one recipe. Else the names of the stages tell their
            settings, and those of another recipe stay beside them.

    Raises:
        UserError: the folder holds a run of another recipe, or something else.
        Stopped: a stage has saved itself after a signal.
    """
    _claim(folder, recipe, same_recipe)
    run = Run(folder, recipe)
    for number, stage in enumerate(stages, 1):
        path = folder / RESULTS / f"{stage.name}.json"
        if path.exists():
            run.results[stage.name] = json.loads(path.read_text())
            say(f"[{number}/{len(stages)}] {stage.title}: done before")
            continue
        say(f"[{number}/{len(stages)}] {stage.title}")
        if stage.makes:
            shutil.rmtree(folder / stage.makes, ignore_errors=True)
        started = time.monotonic()
        result = stage.work(run)
        result["seconds"] = round(time.monotonic() - started, 2)
        durable_write(path, json.dumps(result, indent=1, ensure_ascii=False).encode())
        run.results[stage.name] = result
        release_freed_memory()
    return run


def _claim(folder: Path, recipe: Config, same_recipe: bool) -> None:
    path = folder / RECIPE
    if path.exists():
        if not same_recipe:
            recipe.save(path)
        elif type(recipe).load(path) != recipe:
            raise UserError(
                f"{folder}: holds a run of another recipe (see {RECIPE}); choose another --out, "
                "or the same settings to go on with it"
            )
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder}: holds something else than a run; choose another --out")
    else:
        recipe.save(path)
    remove_leftovers(folder)
