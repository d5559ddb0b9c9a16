"""`qwen2 convert`: write a checkpoint in another format or number type."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2.cli.options import Dtype, Json

if TYPE_CHECKING:
    from qwen2.model.hub import Checkpoint


class Format(StrEnum):
    """What can be written."""

    HF = "hf"
    GGUF = "gguf"


OURS = ("int8", "int4")


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="A folder, a .gguf file, a hub name, a training run's folder or one of its "
            "checkpoints."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="What to write; it must not exist.")],
    format: Annotated[
        Format | None,
        typer.Option(
            help="hf: a folder of safetensors and JSON files; gguf: one file, for llama.cpp. "
            "By the target's name when not given."
        ),
    ] = None,
    dtype: Dtype = "auto",
    quantize: Annotated[
        str | None,
        typer.Option(help="int8 or int4, for this package; for GGUF one of its types: Q8_0 ..."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write SOURCE as a folder that transformers, vLLM and this package load, or as a GGUF file.

    Of a training run it is the newest whole checkpoint; the run may be going on.
    """
    import json

    from qwen2.common.errors import UserError
    from qwen2.model.hub import open_checkpoint
    from qwen2.train.export import is_training, open_training

    if target.exists():
        raise UserError(f"{target}: exists already; choose another place or remove it")
    if format is None:
        format = Format.GGUF if target.suffix == ".gguf" else Format.HF
    training = is_training(Path(source))
    checkpoint = open_training(Path(source)) if training else open_checkpoint(source)
    write = to_gguf if format is Format.GGUF else to_folder
    number_type = write(checkpoint, target, dtype, quantize)
    parameters = checkpoint.config.num_parameters()
    if as_json:
        print(json.dumps({"path": str(target), "parameters": parameters, "dtype": number_type}))
    else:
        print(f"{target}: {parameters:,} parameters in {number_type}")


def to_folder(checkpoint: Checkpoint, target: Path, dtype: str, quantize: str | None) -> str:
    """Write a folder; the number type of its weights."""
    from qwen2.common.errors import UserError
    from qwen2.model.hub import save
    from qwen2.train.export import export, is_training

    if quantize is not None and quantize not in OURS:
        raise UserError(f"quantize {quantize}: a folder takes int8 or int4; add --format gguf")
    tokenizer = checkpoint.tokenizer()
    if quantize is None and is_training(checkpoint.path):
        number_type = checkpoint.choose_dtype(dtype)
        export(checkpoint.path, target, tokenizer, number_type)
        return str(number_type).removeprefix("torch.")
    if quantize == "int4":
        from qwen2.model.calibrate import calibration_windows

        calibration = calibration_windows(tokenizer)
        model = checkpoint.model(dtype, "cpu", quantize=quantize, calibration=calibration)
    else:
        model = checkpoint.model(dtype, "cpu", quantize=quantize)
    save(model, tokenizer, target)
    quantised = model.config.quantisation
    return quantised.method if quantised else str(model.dtype).removeprefix("torch.")


def to_gguf(checkpoint: Checkpoint, target: Path, dtype: str, quantize: str | None) -> str:
    """Write a GGUF file; the type of its matrices."""
    import torch

    from qwen2.common.errors import UserError
    from qwen2.model.gguf_write import write_gguf

    if quantize in OURS:
        raise UserError(f"quantize {quantize}: only a folder takes it; for GGUF, Q8_0 or Q4_1")
    plain = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    type_ = quantize or plain[checkpoint.choose_dtype(dtype)]
    write_gguf(target, checkpoint, type_)
    return type_
