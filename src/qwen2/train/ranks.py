"""What the ranks of a run do as one: agree, fail, write a folder. A process alone does so too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TypeVar, cast

import torch.distributed as dist

from qwen2.common.errors import UserError
from qwen2.common.files import durable_folder, plain_errors

T = TypeVar("T")


def own_rank() -> int:
    """The number of this process among those of the run."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value: T) -> list[T]:
    """The `value` of each rank, on all of them."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def from_first(decide: Callable[[], T]) -> T:
    """What the first rank decides, on all of them.

    Raises:
        UserError: that rank's, on all of them.
    """
    if not dist.is_initialized():
        return decide()
    told: list[tuple[T | None, str | None]] = [(None, None)]
    if own_rank() == 0:
        try:
            told = [(decide(), None)]
        except UserError as error:
            told = [(None, str(error))]
    dist.broadcast_object_list(told)
    value, problem = told[0]
    if problem is not None:
        raise UserError(problem)
    return cast(T, value)


@contextmanager
def together() -> Iterator[None]:
    """A block that fails on every rank when it does on one, so that none waits for it in vain.

    Raises:
        UserError: another rank's, where this one had none; its own error stays what it is.
    """
    caught: Exception | None = None
    try:
        yield
    except Exception as error:
        caught = error
    problems: list[str | None] = [None]
    if dist.is_initialized():
        said = None if caught is None else (str(caught) or type(caught).__name__)
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, said)
    if caught is not None:
        raise caught
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise UserError(f"rank {rank}: {problem}")


@contextmanager
def shared_folder(target: Path) -> Iterator[Path]:
    """`durable_folder` that all ranks write into: `target` is there when all have ended well.

    They must see the same file system.

    Raises:
        UserError: on every rank, when one of them failed.
    """
    with ExitStack() as stack:  # of the first rank: it makes the folder, and finishes or removes it
        made = from_first(lambda: str(stack.enter_context(durable_folder(target, overwrite=True))))
        with together(), plain_errors(target):
            yield Path(made)
        from_first(stack.pop_all().close)
