"""Recipes: overrides, the nearest known key, one line of error."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import Field, ValidationError

from qwen2.common.config import Config
from qwen2.common.errors import UserError


class Inner(Config):
    rate: float = Field(default=1.0, gt=0)
    name: str = "x"


class Outer(Config):
    inner: Inner = Inner()
    maybe: Inner | None = None
    several: tuple[Inner, ...] = ()
    size: int


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_overrides_are_yaml_and_reach_inside(tmp_path: Path) -> None:
    path = write(tmp_path, "size: 1\ninner: {rate: 2}\n")
    recipe = Outer.load(path, ["size=3", "inner.name=y", "maybe.rate=0.5", "several=[{rate: 7}]"])
    assert recipe == Outer(
        size=3, inner=Inner(rate=2, name="y"), maybe=Inner(rate=0.5), several=(Inner(rate=7),)
    )


def test_saved_and_loaded_is_equal(tmp_path: Path) -> None:
    recipe = Outer(size=3, several=(Inner(name="ü"),))
    recipe.save(tmp_path / "deep" / "out.yaml")
    assert Outer.load(tmp_path / "deep" / "out.yaml") == recipe


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Outer(size=1).size = 2  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("size: 1\nsiez: 2", [], "unknown key 'siez'; did you mean 'size'?"),
        ("size: 1\ninner: {rat: 2}", [], "unknown key 'inner.rat'; did you mean 'rate'?"),
        ("size: 1\nmaybe: {nmae: 2}", [], "unknown key 'maybe.nmae'; did you mean 'name'?"),
        ("size: 1\nseveral: [{rat: 2}]", [], "unknown key 'several.0.rat'; did you mean 'rate'?"),
        ("size: 1\nqqq: 2", [], "known keys: inner, maybe, several, size"),
        ("inner: {}", [], "key 'size' is missing"),
        ("size: 1\ninner: {rate: -1}", [], "inner.rate: Input should be greater than 0 (got -1)"),
        ("size: [", [], "not readable as YAML"),
        ("- 1", [], "a recipe is a mapping"),
        ("size: 1", ["size"], "write it as key.sub=value"),
        ("size: 1", ["size.x=1"], "'size' has no keys of its own"),
        ("size: 1", ["inner.rate=["], "override 'inner.rate=['"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    tmp_path: Path, text: str, overrides: list[str], message: str
) -> None:
    with pytest.raises(UserError) as error:
        Outer.load(write(tmp_path, text), overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.yaml: no such recipe"):
        Outer.load(tmp_path / "none.yaml")
