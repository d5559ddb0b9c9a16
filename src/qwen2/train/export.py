"""The model of a training checkpoint in the Hugging Face layout, without a run around it.

Only the weights are read, tensor by tensor: what stands in memory is a shard of what is written.
The bytes are those that saving the model of that step would give.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from qwen2.common.config import one_line
from qwen2.common.errors import UserError
from qwen2.common.files import read_text, verify_folder
from qwen2.common.runtime import parse_dtype
from qwen2.model.hf_folder import MAX_SHARD_BYTES, read_config, write_folder
from qwen2.model.hub import Checkpoint
from qwen2.model.stacks import Layout, pieces_of
from qwen2.model.stored import StoredTensor
from qwen2.model.weights import checked
from qwen2.train.checkpointer import newest_checkpoint

if TYPE_CHECKING:
    from qwen2.tokenizer import Tokenizer


def export(
    checkpoint: Path,
    target: Path,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write the weights of `checkpoint`, a folder `step-N`, to `target` as `hub.save` does.

    Any process may have written it, or any number of ranks.

    Raises:
        UserError: it is no whole checkpoint, `target` exists and `overwrite` is false, or the disk
            is full.
    """
    config, stored = read_config(checkpoint), _stored_weights(checkpoint / "weights")
    sources: dict[str, tuple[StoredTensor, int]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, source in checked(config, stored, checkpoint)[1].items():
        start = 0
        for piece in pieces_of(name, source.shape, Layout.SINGLE):
            sources[piece.name], shapes[piece.name] = (source, start), piece.shape
            start += piece.rows

    def read(name: str) -> Tensor:
        source, start = sources[name]
        tensor = torch.empty(shapes[name], dtype=dtype)
        source.read_rows(start, tensor.flatten(0, -2) if tensor.ndim > 2 else tensor)
        return tensor

    write_folder(
        target,
        config,
        tokenizer,
        shapes,
        read,
        dtype,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def is_training(place: Path) -> bool:
    """Whether `place` is a run's folder or a training checkpoint, and no model."""
    return _is_run(place) or all((place / name).is_dir() for name in ("weights", "optimizer"))


def open_training(place: Path) -> Checkpoint:
    """The model in `place`: a training checkpoint, or a run's folder and its newest whole one.

    Its number type and its tokenizer are what its recipe says. Nothing there is changed, so the run
    may be going on.

    Raises:
        UserError: it is not whole, there is none, or its recipe cannot be read.
    """
    if _is_run(place):
        newest = newest_checkpoint(place / "checkpoints")
        if newest is None:
            raise UserError(f"{place}: no checkpoint yet")
        place = newest
    elif problem := verify_folder(place):
        raise UserError(problem)
    path = place / "recipe.yaml"
    recipe = yaml.safe_load(read_text(path))
    if not isinstance(recipe, dict) or not recipe.keys() >= {"tokenizer", "dtype"}:
        raise UserError(f"{path}: names no tokenizer or no dtype")

    def read_tokenizer() -> Tokenizer:
        from qwen2.tokenizer import Tokenizer

        return Tokenizer.load(Path(recipe["tokenizer"]))

    weights, dtype = _stored_weights(place / "weights"), parse_dtype(recipe["dtype"])
    return Checkpoint(place, read_config(place), weights, dtype, read_tokenizer)


def _is_run(place: Path) -> bool:
    return (place / "checkpoints").is_dir() and not (place / "config.json").exists()


@dataclass(frozen=True)
class _Chunk:
    """A part of a tensor, in a file of its own."""

    path: Path
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _ShardedTensor:
    """A tensor in parts, as ranks wrote them."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[_Chunk, ...]

    def mapped(self) -> Tensor:
        """A copy of the whole; only one part could be mapped."""
        tensor = torch.empty(self.shape, dtype=self.dtype)
        self.read_rows(0, tensor.flatten(0, -2) if tensor.ndim > 2 else tensor)
        return tensor

    def read_rows(self, start: int, out: Tensor) -> None:
        """Fill `out` (rows, width), see StoredTensor; of a stack, matrix by matrix."""
        if len(self.shape) < 3:
            self._read((), start, out)
            return
        outer, skip = divmod(start, self.shape[1])
        while len(out):
            rows = out[: self.shape[1] - skip]
            self._read((outer,), skip, rows)
            outer, skip, out = outer + 1, 0, out[len(rows) :]

    def _read(self, outer: tuple[int, ...], start: int, out: Tensor) -> None:
        """Fill `out` from row `start` on: of matrix `outer`, if this is a stack of them."""
        for chunk in self.chunks:
            inside = [o - b for o, b in zip(outer, chunk.offsets, strict=False)]
            if any(not 0 <= i < size for i, size in zip(inside, chunk.sizes, strict=False)):
                continue
            first, *columns = list(zip(chunk.offsets, chunk.sizes, strict=True))[len(outer) :]
            begin, end = max(start, first[0]), min(start + len(out), sum(first))
            if begin < end:
                with safe_open(chunk.path, framework="pt") as file:
                    part = file.get_slice(self.name)[
                        (*inside, slice(begin - first[0], end - first[0]))
                    ]
                where = (slice(begin - start, end - start), *(slice(b, b + n) for b, n in columns))
                out[where].copy_(part)


def _stored_weights(folder: Path) -> Mapping[str, StoredTensor]:
    """The tensors in `folder`; nothing but headers is read.

    Raises:
        UserError: it is not there, or a tensor is not whole.
    """
    try:
        found = HuggingFaceStorageReader(str(folder)).read_metadata()
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: not of a training checkpoint: {one_line(error)}") from None
    chunks: dict[str, list[_Chunk]] = {}
    types: dict[str, torch.dtype] = {}
    for index, place in found.storage_data.items():
        assert index.offset is not None
        chunk = _Chunk(Path(place.relative_path), tuple(index.offset), tuple(place.shape))
        chunks.setdefault(index.fqn, []).append(chunk)
        types[index.fqn] = place.dtype
    tensors = {}
    for name, facts in found.state_dict_metadata.items():
        shape = tuple(facts.size)  # type: ignore[union-attr]
        there = sum(torch.Size(chunk.sizes).numel() for chunk in chunks[name])
        if there != torch.Size(shape).numel():
            raise UserError(f"{folder}: {name} is not whole: a rank's files are missing")
        tensors[name] = _ShardedTensor(name, shape, types[name], tuple(chunks[name]))
    return tensors
