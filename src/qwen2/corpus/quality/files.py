"""Reading what a trained scorer left: JSON and safetensors, never pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file

from qwen2.common.config import one_line
from qwen2.common.errors import UserError
from qwen2.common.files import read_text


def read_json(path: Path) -> Any:
    """The value in a JSON file.

    Raises:
        UserError: no such file, or not JSON.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON: {one_line(error)}") from None


def read_tensors(
    path: Path, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, NDArray[Any]]:
    """The arrays of a safetensors file; those of `shapes` at least, where they are given.

    Raises:
        UserError: no such file, damaged, or an array is missing or of another shape.
    """
    try:
        tensors = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; train the scorer again") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not readable as safetensors: {one_line(error)}") from None
    for name, shape in (shapes or {}).items():
        if name not in tensors or tensors[name].shape != shape:
            found = tensors[name].shape if name in tensors else "none"
            raise UserError(f"{path}: {name} of shape {shape} expected, {found} found")
    return dict(tensors)
