"""A run goes on after its last finished stage, and never into another run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.pipeline.stages import Run, Stage, run_stages


class Recipe(Config):
    size: int = 1


def stages(calls: list[str], broken: bool = False) -> list[Stage[Recipe]]:
    def first(run: Run[Recipe]) -> dict[str, Any]:
        calls.append("first")
        (run.folder / ".half.1.partial").mkdir()  # as a killed durable_folder leaves behind
        return {"made": run.recipe.size}

    def second(run: Run[Recipe]) -> dict[str, Any]:
        calls.append("second")
        if broken:
            raise RuntimeError("killed here")
        return {"doubled": 2 * run.results["first"]["made"]}

    return [Stage("first", "First", first), Stage("second", "Second", second)]


def test_a_broken_run_goes_on_with_the_stage_that_broke(tmp_path: Path) -> None:
    calls: list[str] = []
    with pytest.raises(RuntimeError):
        run_stages(stages(calls, broken=True), tmp_path / "run", Recipe(size=3))
    run = run_stages(stages(calls), tmp_path / "run", Recipe(size=3))
    assert calls == ["first", "second", "second"]
    assert run.results["second"]["doubled"] == 6
    assert run.seconds == sum(result["seconds"] for result in run.results.values())
    assert not list((tmp_path / "run").glob(".*.partial"))
    again = run_stages(stages(calls), tmp_path / "run", Recipe(size=3))
    assert calls == ["first", "second", "second"]
    assert again.results == run.results


def test_a_folder_of_another_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    run_stages(stages([]), tmp_path / "run", Recipe(size=1))
    before = (tmp_path / "run" / "recipe.yaml").read_text()
    with pytest.raises(UserError, match="another recipe"):
        run_stages(stages([]), tmp_path / "run", Recipe(size=2))
    assert (tmp_path / "run" / "recipe.yaml").read_text() == before


def test_a_folder_with_other_things_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something else than a run"):
        run_stages(stages([]), tmp_path, Recipe())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
