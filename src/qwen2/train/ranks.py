"""What the ranks of a run do as one: agree, fail, write a folder. A process alone does so too.

`group` is where a rank talks to all others: one of its own for what happens beside training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist

from qwen2.common.errors import UserError
from qwen2.common.files import Entry, durable_folder, flushed_entry, plain_errors

T = TypeVar("T")

PATIENCE = timedelta(hours=12)
"""How long a rank waits for one that writes files. One that dies is noticed at once."""

Group = dist.ProcessGroup | None
"""None: the default group, or there is none because this process is alone."""


def patient_group() -> Group:
    """A new group of all ranks that talk on the CPU, while the training's own group is in use.

    All ranks make it together. It ends with the default group.
    """
    if not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def own_rank() -> int:
    """The number of this process among those of the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def rank_count() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def gather(value: T, group: Group = None) -> list[T]:
    """The `value` of each rank, on all of them."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return cast(list[T], values)


def from_first(decide: Callable[[], T], group: Group = None) -> T:
    """What the first rank decides, on all of them.

    Raises:
        UserError: what failed there, on all other ranks; its own error stays what it is.
    """
    if not dist.is_initialized():
        return decide()
    told: list[tuple[T | None, str | None]] = [(None, None)]
    caught: Exception | None = None
    if own_rank() == 0:
        try:
            told = [(decide(), None)]
        except Exception as error:
            caught = error
            told = [(None, _said(error))]
    dist.broadcast_object_list(told, group=group)
    value, problem = told[0]
    if caught is not None:
        raise caught
    if problem is not None:
        raise UserError(problem)
    return cast(T, value)


@contextmanager
def together(group: Group = None) -> Iterator[None]:
    """A block that fails on every rank when it does on one, so that none waits for it in vain.

    Raises:
        UserError: another rank's, where this one had none; its own error stays what it is.
    """
    caught: Exception | None = None
    try:
        yield
    except Exception as error:
        caught = error
    problems = gather(None if caught is None else _said(caught), group)
    if caught is not None:
        raise caught
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise UserError(f"rank {rank}: {problem}")


@contextmanager
def shared_folder(target: Path, group: Group = None) -> Iterator[tuple[Path, list[Path]]]:
    """`durable_folder` that all ranks write into: `target` is there when all have ended well.

    They must see the same file system. Each adds the files that it wrote to the list: it flushes
    and reads them for the manifest itself.

    Raises:
        UserError: on every rank, when one of them failed.
    """
    known: dict[str, Entry] = {}
    with ExitStack() as stack:  # of the first rank: it makes the folder, and finishes or removes it
        writing = durable_folder(target, overwrite=True, known=known)
        made = from_first(lambda: str(stack.enter_context(writing)), group)
        partial, files = Path(made), list[Path]()
        own: dict[str, Entry] = {}
        with together(group), plain_errors(target):
            if not partial.is_dir():
                raise UserError(f"{partial}: not seen; all ranks must share one file system")
            yield partial, files
            own = {path.relative_to(partial).as_posix(): flushed_entry(path) for path in files}
        for entries in gather(own, group):
            known.update(entries)
        from_first(stack.pop_all().close, group)


def _said(error: Exception) -> str:
    return str(error) or type(error).__name__
