"""Recipes: frozen pydantic models read from YAML plus `key.sub=value` on the command line.

Unknown keys are refused with the nearest known name, so that a misspelt setting never passes
silently. The resolved recipe is written beside what it made.
"""

from __future__ import annotations

import difflib
import inspect
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from qwen2.common.errors import UserError
from qwen2.common.files import durable_write


class Config(BaseModel):
    """Base of every configuration: immutable, no unknown keys, validated defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    @classmethod
    def parse(cls, values: Any, where: str = "configuration") -> Self:
        """Validate `values`; a UserError names the key, the place and the nearest known key."""
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected keys and values, got {type(values).__name__}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(f"{where}: {_explain(cls, error)}") from None

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file and apply `key.sub=value` overrides, whose values are YAML too."""
        return cls.parse(read_values(path, overrides), str(path))

    def save(self, path: Path) -> None:
        """Write the resolved configuration as YAML, durably."""
        text = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        durable_write(path, text.encode())


def read_values(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys and values of a YAML file with its overrides, not yet checked against a recipe.

    Raises:
        UserError: the file is not there, or is not a mapping in YAML; or an override is malformed.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such recipe") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    for override in overrides:
        _apply(values, override)
    return values


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """The keys and values of `key.sub=value` alone.

    Raises:
        UserError: one is malformed.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        _apply(values, override)
    return values


def one_line(error: BaseException) -> str:
    """The message of `error` on one line."""
    return " ".join(str(error).split())


def _apply(values: dict[str, Any], override: str) -> None:
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"override {override!r}: write it as key.sub=value")
    *path, last = key.split(".")
    for part in path:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise UserError(f"override {override!r}: {part!r} has no keys of its own")
        values = inner
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: {one_line(error)}") from None


def _explain(cls: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(_model_at(cls, first["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"unknown key {place!r}; {hint}"
    if first["type"] == "missing":
        return f"key {place!r} is missing"
    message = first["msg"].removeprefix("Value error, ")
    return f"{place}: {message} (got {first['input']!r})" if place else message


def _model_at(cls: type[BaseModel], path: tuple[int | str, ...]) -> type[BaseModel]:
    """The model class at `path` below `cls`: through optional fields, lists and tagged unions."""
    models = [cls]
    for part in path:
        if isinstance(part, str) and part in models[0].model_fields:
            models = list(_models_in(models[0].model_fields[part].annotation)) or models
        elif isinstance(part, str):
            models = [model for model in models if _has_tag(model, part)] or models
    return models[0]


def _has_tag(cls: type[BaseModel], tag: str) -> bool:
    """Whether a field of `cls` has `tag` as its only value, so that a union tells it by that."""
    return any(typing.get_args(f.annotation) == (tag,) for f in cls.model_fields.values())


def _models_in(annotation: Any) -> typing.Iterator[type[BaseModel]]:
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)
