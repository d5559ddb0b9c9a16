"""Training checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a durable folder `step-00000100` with

    weights.safetensors     fp32 master weights, by published name
    optimizer.safetensors   `{key}.{parameter name}` for each key of the optimizer's state
    rng.safetensors         the state of torch's generator
    state.json              step, tokens, loader, length of the metrics file
    recipe.yaml             what is being run

There is no pickle in it: reading a foreign checkpoint runs no code. The newest one that is whole by
its manifest is used; a damaged one is named and passed over.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qwen2.common.config import Config, one_line
from qwen2.common.errors import UserError
from qwen2.common.files import durable_folder, remove_leftovers, verify_folder
from qwen2.common.progress import say
from qwen2.model.hf_folder import plain_io_errors


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


def save_checkpoint(
    folder: Path,
    state: RunState,
    masters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loader: dict[str, Any],
    recipe: Config,
    keep: int,
) -> Path:
    """Write `folder`/step-N, then remove all checkpoints but it and the `keep` - 1 before it.

    Those after it are removed too: the run went on from an older one because they were damaged.

    Raises:
        UserError: the disk is full; the checkpoints already there are untouched, and named.
    """
    target = folder / f"step-{state.step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with durable_folder(target, overwrite=True) as partial, plain_io_errors():
            save_file({n: p.detach() for n, p in masters.items()}, partial / "weights.safetensors")
            save_file(_optimizer_tensors(masters, optimizer), partial / "optimizer.safetensors")
            save_file({"torch": torch.get_rng_state()}, partial / "rng.safetensors")
            values = {"counters": asdict(state), "loader": loader}
            (partial / "state.json").write_text(json.dumps(values, indent=1))
            recipe.save(partial / "recipe.yaml")
    except UserError as error:
        last = max(_steps(folder), default=None)
        left = "there is none before it" if last is None else f"the last good one is {last[1]}"
        raise UserError(f"{error}; {left}; make room, then run the same command again") from error
    before = sorted((step, path) for step, path in _steps(folder) if step <= state.step)
    stay = {path for _, path in before[-keep:]}
    for _, path in list(_steps(folder)):
        if path not in stay:
            shutil.rmtree(path)
    return target


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in `folder`, after removing what a killed process left.

    None when there are none at all; damaged ones are named and passed over.

    Raises:
        UserError: all are damaged. Beginning again is not for the program to decide.
    """
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
    path: Path, masters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[RunState, dict[str, Any]]:
    """Read `path` into weights, optimizer and torch's generator; returns counters and loader state.

    Raises:
        UserError: it belongs to another model or optimizer.
    """
    try:
        weights = load_file(path / "weights.safetensors")
        moments = load_file(path / "optimizer.safetensors")
        rng = load_file(path / "rng.safetensors")["torch"]
        values = json.loads((path / "state.json").read_text())
        state, loader = RunState(**values["counters"]), values["loader"]
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a training checkpoint: {one_line(error)}") from None
    _load_weights(path, weights, masters)
    _load_optimizer(path, moments, masters, optimizer)
    torch.set_rng_state(rng)
    return state, loader


@torch.no_grad()
def _load_weights(path: Path, weights: dict[str, Tensor], masters: dict[str, nn.Parameter]) -> None:
    if weights.keys() != masters.keys():
        name = min(weights.keys() ^ masters.keys())
        raise UserError(f"{path}: {name} is only in {'it' if name in weights else 'the model'}")
    for name, master in masters.items():
        if weights[name].shape != master.shape:
            raise UserError(
                f"{path}: {name} is {list(weights[name].shape)}, the model's {list(master.shape)}"
            )
        master.copy_(weights[name])


def _optimizer_tensors(
    masters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": tensor
        for name, master in masters.items()
        for key, tensor in optimizer.state.get(master, {}).items()
    }


def _load_optimizer(
    path: Path,
    tensors: dict[str, Tensor],
    masters: dict[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
) -> None:
    optimizer.state.clear()
    for full, tensor in tensors.items():
        key, _, name = full.partition(".")
        if name not in masters:
            raise UserError(f"{path}: optimizer state of {name!r}, which the model has not")
        # The step counter stays on the CPU unless the fused kernel wants it beside the weights.
        optimizer.state[masters[name]][key] = tensor.to(masters[name].device)


def _steps(folder: Path) -> Iterator[tuple[int, Path]]:
    for path in folder.iterdir():
        if found := re.fullmatch(r"step-(\d{8,})", path.name):
            yield int(found[1]), path
