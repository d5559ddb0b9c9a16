"""Training checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a durable folder `step-00000100` with

    weights/      fp32 master weights, by published name
    optimizer/    `{key}.{parameter name}` for each key of the optimizer's state
    rng/          of each rank, the state of torch's generator
    state.json    step, tokens, loader, length of the metrics file
    recipe.yaml   what is being run

Tensors are in safetensors files that torch.distributed.checkpoint writes and reads: every rank its
own shards, with their places in the whole, so that a run may go on with any other number of ranks.
There is no pickle in it: reading a foreign checkpoint runs no code. The newest one that is whole by
its manifest is used; a damaged one is named and passed over.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from qwen2.common.config import Config, one_line
from qwen2.common.errors import UserError
from qwen2.common.files import remove_leftovers, verify_folder
from qwen2.common.progress import say
from qwen2.model.hf_folder import plain_io_errors
from qwen2.train.ranks import from_first, own_rank, shared_folder

FILE_BYTES = 1 << 28
"""Of tensors in a file of weights or optimizer state: it stands in memory once more meanwhile."""


@dataclass
class RunState:
    """The counters of a run."""

    step: int = 0
    """Updates of the weights so far."""
    tokens: int = 0
    """Tokens that these updates were computed from: targets, so padding is none."""
    skipped: int = 0
    """Batches passed over because their loss or gradient was not finite."""
    metrics_bytes: int = 0
    """Length of the metrics file at this point."""
    losses: list[float] = field(default_factory=list)
    """Of the last steps, where spikes are looked for."""


def save_checkpoint(
    folder: Path,
    state: RunState,
    masters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loader: dict[str, Any],
    recipe: Config,
    keep: int,
) -> Path:
    """Write `folder`/step-N, then remove all checkpoints but it and the `keep` - 1 before it.

    Those after it are removed too: the run went on from an older one because they were damaged.
    Every rank calls this; each writes what it holds.

    Raises:
        UserError: the disk is full; the checkpoints already there are untouched, and named.
    """
    target = folder / f"step-{state.step:08d}"
    try:
        with shared_folder(target) as partial, plain_io_errors():
            _write_tensors(partial / "weights", {n: p.detach() for n, p in masters.items()})
            _write_tensors(partial / "optimizer", _optimizer_tensors(masters, optimizer))
            (partial / "rng").mkdir(exist_ok=True)
            save_file(
                {"torch": torch.get_rng_state()}, partial / f"rng/{own_rank():05d}.safetensors"
            )
            if own_rank() == 0:
                values = {"counters": asdict(state), "loader": loader}
                (partial / "state.json").write_text(json.dumps(values, indent=1))
                recipe.save(partial / "recipe.yaml")
    except UserError as error:
        last = max(_steps(folder), default=None)
        left = "there is none before it" if last is None else f"the last good one is {last[1]}"
        raise UserError(f"{error}; {left}; make room, then run the same command again") from error
    if own_rank() == 0:
        before = sorted((step, path) for step, path in _steps(folder) if step <= state.step)
        stay = {path for _, path in before[-keep:]}
        for _, path in list(_steps(folder)):
            if path not in stay:
                shutil.rmtree(path)
    return target


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, after removing what a killed process left.

    None when there are none at all; damaged ones are named and passed over. The first rank looks.

    Raises:
        UserError: all are damaged. Beginning again is not for the program to decide.
    """
    return from_first(lambda: _newest(folder))


def _newest(folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    remove_leftovers(folder)
    found = sorted(_steps(folder), reverse=True)
    for _, path in found:
        problem = verify_folder(path)
        if problem is None:
            return path
        say(f"checkpoint passed over: {problem}")
    if found:
        raise UserError(f"{folder}: no checkpoint is whole; remove the folder to begin again")
    return None


def load_checkpoint(
    path: Path, masters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[RunState, dict[str, Any]]:
    """Read `path` into weights, optimizer and torch's generator; returns counters and loader state.

    Every rank calls this; each reads what it holds, whoever wrote it. A rank that there was not
    takes the generator of the first.

    Raises:
        UserError: it belongs to another model or optimizer.
    """
    own = _rng_of(path, own_rank())
    try:
        rng = load_file(own if own.exists() else _rng_of(path, 0))["torch"]
        values = json.loads((path / "state.json").read_text())
        state, loader = RunState(**values["counters"]), values["loader"]
        weights, moments = _sizes(path / "weights"), _sizes(path / "optimizer")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a training checkpoint: {one_line(error)}") from None
    _check(path, weights, masters)
    state_of = _new_state(path, moments, masters)
    with torch.no_grad():
        _read_tensors(path / "weights", {n: p.detach() for n, p in masters.items()})
        _read_tensors(path / "optimizer", _by_key(masters, state_of))
    optimizer.state.clear()
    for name, values_of in state_of.items():
        optimizer.state[masters[name]] = values_of
    torch.set_rng_state(rng)
    return state, loader


def _write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Each rank's shards of `tensors`, in files of about `FILE_BYTES`."""
    folder.mkdir(exist_ok=True)
    if not tensors:  # an optimizer before its first step
        return
    number, size, file_of = 1, 0, {}
    for name, tensor in tensors.items():
        if size and size + tensor.nbytes > FILE_BYTES:
            number, size = number + 1, 0
        file_of[name], size = number, size + tensor.nbytes
    writer = HuggingFaceStorageWriter(str(folder), file_of, save_distributed=True)
    with _its_own_errors():
        save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())


def _read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` from `folder`, in place."""
    if tensors:
        reader = HuggingFaceStorageReader(str(folder))
        with _its_own_errors():
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())


def _sizes(folder: Path) -> dict[str, torch.Size]:
    """Shape of each tensor in `folder`, over all shards."""
    if not any(folder.iterdir()):
        return {}
    found = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: facts.size for name, facts in found.items()}  # type: ignore[union-attr]


def _check(
    path: Path, weights: Mapping[str, torch.Size], masters: Mapping[str, nn.Parameter]
) -> None:
    if weights.keys() != masters.keys():
        name = min(weights.keys() ^ masters.keys())
        raise UserError(f"{path}: {name} is only in {'it' if name in weights else 'the model'}")
    for name, master in masters.items():
        if weights[name] != master.shape:
            raise UserError(
                f"{path}: {name} is {list(weights[name])}, the model's {list(master.shape)}"
            )


def _optimizer_tensors(
    masters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    return _by_key(
        masters, {name: optimizer.state.get(master, {}) for name, master in masters.items()}
    )


def _by_key(
    masters: Mapping[str, nn.Parameter], state_of: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": tensor
        for name in masters
        for key, tensor in state_of.get(name, {}).items()
    }


def _new_state(
    path: Path, sizes: Mapping[str, torch.Size], masters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, Tensor]]:
    """Room for the optimizer's state: by parameter and key."""
    state: dict[str, dict[str, Tensor]] = {}
    for full, size in sizes.items():
        key, _, name = full.partition(".")
        if name not in masters:
            raise UserError(f"{path}: optimizer state of {name!r}, which the model has not")
        master = masters[name].detach()
        # What has the weight's shape is laid out as it is; a step counter is every rank's own.
        room = torch.zeros_like(master) if size == master.shape else master.new_zeros(size)
        state.setdefault(name, {})[key] = room
    return state


@contextlib.contextmanager
def _its_own_errors() -> Iterator[None]:
    """Errors of torch's checkpoints as what they were raised as; a full disk as that."""
    try:
        with warnings.catch_warnings():  # of a world of one, and of what is on its way in torch
            warnings.simplefilter("ignore")
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise cause from error


def _rng_of(folder: Path, rank: int) -> Path:
    return folder / f"rng/{rank:05d}.safetensors"


def _steps(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if found := re.fullmatch(r"step-(\d{8,})", path.name):
            yield int(found[1]), path
