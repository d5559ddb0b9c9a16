"""Training checkpoints: everything that a run needs to go on as if it had never stopped.

A checkpoint is a durable folder `step-00000100` with

    weights/      fp32 master weights, by published name
    optimizer/    `{key}.{parameter name}` for each key of the optimizer's state
    rng/          of each rank, the state of torch's generator
    state.json    step, tokens, loader, length of the metrics file
    config.json   the model's shape at this step
    recipe.yaml   what is being run

Tensors are in safetensors files that torch.distributed.checkpoint writes and reads: every rank its
own shards, with their places in the whole, so that a run may go on with any other number of ranks.
There is no pickle in it: reading a foreign checkpoint runs no code. checkpointer.py says when they
are written and which are kept and used.
"""

from __future__ import annotations

import contextlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from qwen2.common.config import Config, one_line
from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig
from qwen2.model.hf_config import config_to_hf
from qwen2.train.ranks import Group, from_first, gather, own_rank, together

FILE_BYTES = 1 << 28
"""Of tensors in a file of weights or optimizer state: it stands in memory once more meanwhile."""

# Not where they arise: who restores filters in a thread undoes what others set meanwhile.
warnings.filterwarnings("ignore", "torch.distributed is disabled", module=r"torch\.distributed")


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


@dataclass
class Moment:
    """What a checkpoint is written from; its tensors may be the run's own."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    rng: Tensor
    texts: dict[str, str]
    """Files that the first rank writes, by name."""
    recipe: Config


def take(
    state: RunState,
    masters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loader: dict[str, Any],
    recipe: Config,
    config: ModelConfig,
) -> Moment:
    """This moment of a run; no tensor is copied, but the generator's state."""
    values = {"counters": asdict(state), "loader": loader}
    return Moment(
        state.step,
        {name: master.detach() for name, master in masters.items()},
        _by_key(masters, {name: optimizer.state.get(p, {}) for name, p in masters.items()}),
        torch.get_rng_state(),
        {
            "state.json": json.dumps(values, indent=1),
            "config.json": json.dumps(config_to_hf(config, "float32"), indent=2) + "\n",
        },
        recipe,
    )


def write(moment: Moment, folder: Path, group: Group = None) -> list[Path]:
    """Write `moment` into `folder`, which is there; the files that this rank wrote.

    Every rank of `group` calls this; each writes what it holds.
    """
    with together(group):  # before anyone waits for what another writes
        for name in ("weights", "optimizer", "rng"):
            (folder / name).mkdir(exist_ok=True)
    files = _write_tensors(folder / "weights", moment.weights, group)
    files += _write_tensors(folder / "optimizer", moment.optimizer, group)
    rng = _rng_of(folder, own_rank())
    rng.write_bytes(to_bytes({"torch": moment.rng}))
    files.append(rng)
    if own_rank() == 0:
        for name, text in moment.texts.items():
            (folder / name).write_text(text)
        moment.recipe.save(folder / "recipe.yaml")
        files += [folder / name for name in (*moment.texts, "recipe.yaml")]
    return files


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
        weights, moments = from_first(
            lambda: (_sizes(path / "weights"), _sizes(path / "optimizer"))
        )
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a training checkpoint: {one_line(error)}") from None
    _check(path, weights, masters)
    state_of = _new_state(path, moments, weights, masters)
    with torch.no_grad():
        _read_tensors(path / "weights", {n: p.detach() for n, p in masters.items()})
        if moments:
            _read_tensors(path / "optimizer", _by_key(masters, state_of))
    optimizer.state.clear()
    for name, values_of in state_of.items():
        optimizer.state[masters[name]] = values_of
    torch.set_rng_state(rng)
    return state, loader


class _Writer(HuggingFaceStorageWriter):
    """Writes each rank's shards into its own files of about `FILE_BYTES`, and knows which."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder), save_distributed=True)
        self.folder = folder
        self.files: list[Path] = []

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # The plan's own division is the first rank's, by whole tensors and those that it has.
        number, size, file_of = 1, 0, dict[str, int]()
        for item in plan.items:
            assert item.tensor_data is not None
            bytes_ = (
                item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
            )
            if size and size + bytes_ > FILE_BYTES:
                number, size = number + 1, 0
            file_of[item.index.fqn] = number
            size += bytes_
        own = {**plan.storage_data, "fqn_to_index_mapping": file_of}
        written = super().write_data(replace(plan, storage_data=own), planner)
        names = {result.storage_data.relative_path for result in written.value()}
        self.files = [self.folder / name for name in sorted(names)]
        return written


def _write_tensors(folder: Path, tensors: dict[str, Tensor], group: Group) -> list[Path]:
    """Each rank's shards of `tensors`; the files that this rank wrote."""
    if not tensors:  # an optimizer before its first step
        return []
    writer = _Writer(folder)
    with _its_own_errors():
        alone = not dist.is_initialized()
        save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
    return writer.files


def _read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Fill `tensors` from `folder`, in place."""
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
    """The ranks together have the weights of `path`: one of a pipeline has those of its stage."""
    names = {name for own in gather(list(masters)) for name in own}
    if weights.keys() != names:
        name = min(weights.keys() ^ names)
        raise UserError(f"{path}: {name} is only in {'it' if name in weights else 'the model'}")
    with together():
        for name, master in masters.items():
            if weights[name] != master.shape:
                raise UserError(
                    f"{path}: {name} is {list(weights[name])}, the model's {list(master.shape)}"
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
    path: Path,
    sizes: Mapping[str, torch.Size],
    weights: Mapping[str, torch.Size],
    masters: Mapping[str, nn.Parameter],
) -> dict[str, dict[str, Tensor]]:
    """Room for the optimizer's state of this rank's weights: by parameter and key."""
    state: dict[str, dict[str, Tensor]] = {}
    for full, size in sizes.items():
        key, _, name = full.partition(".")
        if name not in weights:
            raise UserError(f"{path}: optimizer state of {name!r}, which the model has not")
        if name in masters:
            master = masters[name].detach()
            # What has the weight's shape is laid out as it is; a step counter is every rank's own.
            room = torch.zeros_like(master) if size == master.shape else master.new_zeros(size)
            state.setdefault(name, {})[key] = room
    return state


@contextlib.contextmanager
def _its_own_errors() -> Iterator[None]:
    """Errors of torch's checkpoints as what they were raised as; a full disk as that."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise cause from error


def _rng_of(folder: Path, rank: int) -> Path:
    return folder / f"rng/{rank:05d}.safetensors"


def steps_in(folder: Path) -> Iterator[tuple[int, Path]]:
    """Step and place of each checkpoint in `folder`, whole or not, in any order."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if found := re.fullmatch(r"step-(\d{8,})", path.name):
            yield int(found[1]), path
