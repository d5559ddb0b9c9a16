"""When checkpoints are written, which of them stay, and which one a run goes on from.

Asynchronous saving, as in CheckFreq (Mohan et al. 2021): training waits while weights and optimizer
state are copied in the host's memory; a thread writes the copy while training goes on. The thread
is the only one that talks in its group of ranks, so that it never comes between collectives of
training. Its files are those of synchronous saving.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.common.files import remove_folder, remove_leftovers, verify_folder
from qwen2.common.progress import say
from qwen2.model.config import ModelConfig
from qwen2.train.checkpoints import Moment, RunState, steps_in, take, write
from qwen2.train.ranks import (
    Group,
    from_first,
    gather,
    own_rank,
    patient_group,
    rank_count,
    shared_folder,
)


def newest_checkpoint(folder: Path, group: Group = None) -> Path | None:
    """The newest whole checkpoint in `folder`; nothing there is changed.

    None when there are none at all; damaged ones are named and passed over. The ranks of `group`
    share the reading.

    Raises:
        UserError: all are damaged. Beginning again is not for the program to decide.
    """
    found = from_first(lambda: sorted(steps_in(folder), reverse=True), group)
    for _, path in found:
        told = gather(verify_folder(path, (own_rank(), rank_count())), group)
        problems = [problem for problem in told if problem is not None]
        if not problems:
            return path
        if own_rank() == 0:
            say(f"checkpoint passed over: {problems[0]}")
    if found:
        raise UserError(f"{folder}: no checkpoint is whole; remove the folder to begin again")
    return None


class Checkpointer:
    """The checkpoints of a run in `folder`. All ranks make it, and call it, together.

    keep: the newest that stay; older ones go when a new one is there.
    keep_every: those of its multiples stay as well.
    asynchronous: write in a thread, from a second copy of weights and optimizer state.

    As a context manager it ends when nothing is left to write.
    """

    def __init__(
        self, folder: Path, keep: int, keep_every: int | None = None, asynchronous: bool = False
    ) -> None:
        self.folder, self.keep, self.keep_every = folder, keep, keep_every
        self.last: Path | None = None
        """The newest whole checkpoint, as far as known."""
        self.group = patient_group()
        self._damaged: set[Path] = set()
        self._copies = _HostCopies() if asynchronous else None
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._pending: Future[None] | None = None

    def newest(self) -> Path | None:
        """The checkpoint to go on from, see `newest_checkpoint`.

        What a killed process left half-written is removed.
        """
        from_first(lambda: remove_leftovers(self.folder), self.group)
        self.last = newest_checkpoint(self.folder, self.group)
        if self.last is not None:  # those after it were passed over
            found = sorted(steps_in(self.folder))
            paths = [path for _, path in found]
            self._damaged = set(paths[paths.index(self.last) + 1 :])
        return self.last

    def save(
        self,
        state: RunState,
        masters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        loader: dict[str, Any],
        recipe: Config,
        config: ModelConfig,
    ) -> None:
        """Write this moment to `folder`/step-N, then remove the checkpoints that do not stay.

        Those after it are removed too: the run went on from an older one because they were damaged.
        Whatever was given may change when this returns. A save that is still going on is waited
        for.

        Raises:
            UserError: the disk is full or fails, now or in the last save; the checkpoints already
                there are untouched, and named.
        """
        self.wait()
        moment = take(state, masters, optimizer, loader, recipe, config)
        if self._copies is None:
            self._write(moment)
        else:
            self._pending = self._thread.submit(self._write, self._copies.of(moment))

    def wait(self) -> None:
        """Return when nothing is left to write.

        Raises:
            UserError: what the last save failed of; it is told once.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.wait()
        except Exception as problem:
            if error is None:
                raise
            say(f"checkpoint not written: {problem}")

    def _write(self, moment: Moment) -> None:
        target = self.folder / f"step-{moment.step:08d}"
        try:
            with shared_folder(target, self.group) as (partial, files):
                files += write(moment, partial, self.group)
            self.last = target
            self._damaged.discard(target)
            from_first(lambda: self._remove_old(moment.step), self.group)
        except UserError as error:
            whole = [path for _, path in sorted(steps_in(self.folder)) if path not in self._damaged]
            left = f"the last good one is {whole[-1]}" if whole else "there is none before it"
            raise UserError(
                f"{error}; {left}; mend that, then run the same command again"
            ) from error

    def _remove_old(self, newest: int) -> None:
        found = sorted(steps_in(self.folder))
        before = [path for step, path in found if step <= newest and path not in self._damaged]
        stay = set(before[-self.keep :])
        if self.keep_every:
            stay |= {path for step, path in found if path in before and step % self.keep_every == 0}
        for _, path in found:
            if path not in stay:
                remove_folder(path)
                self._damaged.discard(path)


class _HostCopies:
    """Copies in the host's memory, which later moments use again: memory that is new is slow."""

    def __init__(self) -> None:
        self._room: dict[str, Tensor] = {}

    def of(self, moment: Moment) -> Moment:
        """`moment` with tensors of its own; that of the call before is overwritten."""
        copy = replace(
            moment,
            weights={name: self._copy(f"weights/{name}", t) for name, t in moment.weights.items()},
            optimizer={name: self._copy(name, t) for name, t in moment.optimizer.items()},
        )
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return copy

    @torch.no_grad()
    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if name not in self._room:
            self._room[name] = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
        room = self._room[name].copy_(own, non_blocking=True)
        if not isinstance(tensor, DTensor):
            return room
        # `from_local` would put it on the mesh's device again.
        copy = tensor.detach()
        copy._local_tensor = room  # type: ignore[attr-defined]
        return copy
