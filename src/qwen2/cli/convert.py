"""`qwen2 convert`: write a checkpoint in another format or number type."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qwen2.cli.options import Dtype, Json


class Format(StrEnum):
    """What can be written."""

    HF = "hf"


def convert(
    source: Annotated[str, typer.Argument(help="A folder, a .gguf file, or a hub name.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.")],
    format: Annotated[Format, typer.Option(help="hf: safetensors and JSON files.")] = Format.HF,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Write SOURCE as TARGET, a folder that transformers, vLLM and this package load."""
    import json

    from qwen2.common.errors import UserError
    from qwen2.model.hub import load, save

    if target.exists():
        raise UserError(f"{target}: exists already; choose another place or remove it")
    model, tokenizer = load(source, dtype=dtype, device="cpu")
    save(model, tokenizer, target)
    parameters = model.config.num_parameters()
    number_type = str(model.dtype).removeprefix("torch.")
    if as_json:
        print(json.dumps({"path": str(target), "parameters": parameters, "dtype": number_type}))
    else:
        print(f"{target}: {parameters:,} parameters in {number_type}")
