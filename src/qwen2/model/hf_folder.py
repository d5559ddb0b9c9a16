"""Checkpoints in the Hugging Face layout: a folder of config.json and safetensors files.

Written folders load in transformers, vLLM and llama.cpp's converter. Weights in pickle files are
refused: unpickling runs whatever code the file holds.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qwen2.common.config import one_line
from qwen2.common.errors import UserError
from qwen2.common.files import durable_folder
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2
from qwen2.model.hf_config import config_from_hf, config_to_hf
from qwen2.model.quantised_linear import quantised_types
from qwen2.model.stacks import published
from qwen2.model.weights import tied_names

if TYPE_CHECKING:
    from qwen2.tokenizer import Tokenizer

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"

MAX_SHARD_BYTES = 5 * 10**9

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_INTEGERS = {"I8": torch.int8, "U8": torch.uint8}  # of quantised weights


@dataclass(frozen=True)
class SafeTensor:
    """One tensor of a safetensors file."""

    path: Path
    file: Any  # the open file, whose one mapping its tensors share
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def mapped(self) -> Tensor:
        """A private mapping of the file."""
        tensor: Tensor = self.file.get_tensor(self.name)
        return tensor

    def read_rows(self, start: int, out: Tensor) -> None:
        """Copy rows; the file is opened anew, so that its pages leave memory with the mapping."""
        with _clear_errors(self.path), safe_open(self.path, framework="pt") as file:
            part = file.get_slice(self.name)
            if len(self.shape) < 3:
                out.copy_(part[start : start + len(out)])
                return
            outer, skip = divmod(start, self.shape[1])
            while len(out):
                rows = out[: self.shape[1] - skip]
                rows.copy_(part[outer, skip : skip + len(rows)])
                outer, skip, out = outer + 1, 0, out[len(rows) :]


def read_config(folder: Path) -> ModelConfig:
    """The configuration of a folder; the ids that end generation come from generation_config.json.

    Raises:
        UserError: a file is missing, is not JSON or describes another model.
    """
    values = _read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    if generation.is_file():
        values["eos_token_id"] = _read_json(generation).get(
            "eos_token_id", values.get("eos_token_id")
        )
    return config_from_hf(values, str(folder / "config.json"))


def stored_tensors(folder: Path) -> dict[str, SafeTensor]:
    """Every tensor of the folder's safetensors files, by name; nothing but headers is read.

    Raises:
        UserError: no safetensors file, a broken one, or an index that does not fit its shards.
    """
    if (folder / SINGLE).is_file():
        return _tensors_of(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _sharded(folder / INDEX)
    pickles = sorted(p.name for suffix in ("bin", "pt", "pth") for p in folder.glob(f"*.{suffix}"))
    if pickles:
        raise UserError(
            f"{folder}: its weights are in a pickle file ({pickles[0]}), which can run any code "
            "when it is read; convert it where you trust it with transformers' "
            "model.save_pretrained(folder)"
        )
    raise UserError(f"{folder}: neither {SINGLE} nor {INDEX} is there")


def save(
    model: Qwen2,
    tokenizer: Tokenizer,
    folder: Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write `model` as `write_folder` does; `dtype` None keeps the model's.

    Experts become a matrix each, as published; those of a quantised model stay stacked, for only
    this package reads them and so they can be mapped.

    Raises:
        UserError: the folder exists and `overwrite` is false, or the disk is full.
    """
    chosen = dtype or model.dtype
    own = model.state_dict()
    for name in tied_names(model.config, own):
        del own[name]
    kept = quantised_types(model)
    state = own  # of views, so that nothing is copied before its shard
    if not kept:
        state = dict(pair for name, tensor in own.items() for pair in published(name, tensor))
    write_folder(
        folder,
        model.config,
        tokenizer,
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        lambda name: state[name].to("cpu", kept.get(name, chosen)).contiguous(),
        chosen,
        kept=kept,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def write_folder(
    folder: Path,
    config: ModelConfig,
    tokenizer: Tokenizer,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], Tensor],
    dtype: torch.dtype,
    *,
    kept: Mapping[str, torch.dtype] = MappingProxyType({}),
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    notes: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Write `folder` in the Hugging Face layout, with tokenizer and manifest, or nothing.

    `tensor` is asked for each name of `shapes` once, in their order, and answers in `dtype`, or in
    the type that `kept` gives, on the CPU. One shard at a time is in memory, of `max_shard_bytes`
    at most, unless a single tensor is larger. `notes` are further JSON files by name.

    Raises:
        UserError: the folder exists and `overwrite` is false, or the disk is full.
    """
    number_type = str(dtype).removeprefix("torch.")
    own = [] if config.eos_token_id is None else np.atleast_1d(config.eos_token_id).tolist()
    generation = {
        "eos_token_id": sorted(tokenizer.stop_ids.union(own)),
        "pad_token_id": tokenizer.pad_id,
    }
    if not own:
        config = config.model_copy(update={"eos_token_id": tokenizer.eos_id})
    sizes = {
        name: torch.Size(shape).numel() * kept.get(name, dtype).itemsize
        for name, shape in shapes.items()
    }
    with durable_folder(folder, overwrite=overwrite) as partial, plain_io_errors():
        _write_json(partial / "config.json", config_to_hf(config, number_type))
        _write_json(partial / "generation_config.json", generation)
        for name, values in (notes or {}).items():
            _write_json(partial / name, values)
        tokenizer.save(partial)
        _write_weights(partial, sizes, tensor, max_shard_bytes)


def _write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    tensor: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> None:
    """Write tensors of `sizes` bytes in their order; each is asked for when its shard's turn is."""
    shards = plan_shards(sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        # The call alone holds the tensors: they are gone before those of the next shard are made.
        save_file({n: tensor(n) for n in names}, folder / file, metadata={"format": "pt"})
        # The library makes files that only their owner may read.
        (folder / file).chmod((folder / "config.json").stat().st_mode)
    if len(shards) > 1:
        _write_json(
            folder / INDEX,
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
        )


def plan_shards(sizes: Mapping[str, int], max_shard_bytes: int) -> list[list[str]]:
    """Names of each shard: in order, as many as fit; what is larger by itself stands alone."""
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


@contextmanager
def plain_io_errors() -> Iterator[None]:
    """safetensors wraps the operating system's errors in text: unwrap a full disk."""
    try:
        yield
    except SafetensorError as error:
        if f"os error {errno.ENOSPC}" in str(error):
            raise OSError(errno.ENOSPC, "no space left on device") from error
        raise


def _sharded(index: Path) -> dict[str, SafeTensor]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise UserError(f"{index}: weight_map must give each tensor's file")
    tensors: dict[str, SafeTensor] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index}: {shard!r} is not the name of a safetensors file beside it")
        if not (index.parent / shard).is_file():
            raise UserError(f"{index}: names {shard!r}, which is not there; fetch it again")
        for name, tensor in _tensors_of(index.parent / shard).items():
            if name in tensors:
                raise UserError(
                    f"{index.parent}: tensor {name!r} is both in {tensors[name].path.name} "
                    f"and in {shard}"
                )
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].path.name != shard:
            raise UserError(f"{index}: places {name!r} in {shard!r}, which does not have it")
    return tensors


def _tensors_of(path: Path) -> dict[str, SafeTensor]:
    tensors = {}
    with _clear_errors(path):
        file: Any = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118 - not a dict
            part = file.get_slice(name)
            dtype = (_DTYPES | _INTEGERS).get(part.get_dtype())
            if dtype is None:
                raise UserError(
                    f"{path}: tensor {name!r} has type {part.get_dtype()}; "
                    f"known are {', '.join(_DTYPES)}"
                )
            tensors[name] = SafeTensor(path, file, name, tuple(part.get_shape()), dtype)
    return tensors


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(
            f"{path}: not a whole safetensors file: {one_line(error)}; fetch it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: is missing") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON: {one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
