"""Many tasks over local processes, or over a Ray cluster: the one place that knows which.

A task leaves its work in durable files and is done when they are there; what it returns is only
told onwards. So it does not matter where tasks run, in which order, or how often one is begun: a
run that was killed is begun again with what has no files yet.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait as wait_for
from multiprocessing.synchronize import Event
from typing import Any, Literal, Protocol, TypeVar

from qwen2.common.errors import UserError
from qwen2.common.signals import stop_on_signals

Engine = Literal["local", "ray"]
T = TypeVar("T")
R = TypeVar("R")

_stopping: Callable[[], object] = lambda: None  # noqa: E731 - a function until told otherwise


def stopping() -> bool:
    """Whether the run was asked to stop: a long task looks now and then, and returns early."""
    return bool(_stopping())


class Workers(Protocol):
    """Where tasks run."""

    def stopped(self) -> str | None:
        """The signal that came, if one did; `map` then begins no further task."""

    def map(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        """What `work` returns for each task, as they finish; `work` can be pickled."""


@contextmanager
def open_workers(count: int, engine: Engine = "local") -> Iterator[Workers]:
    """Workers for a whole run: `count` local processes (one: this process), or Ray's cluster.

    Raises:
        UserError: a process was killed, or there is no Ray or no cluster to reach.
    """
    with stop_on_signals() as stopped:
        if engine == "ray":
            from qwen2.pipeline.ray_workers import RayWorkers

            yield RayWorkers(stopped)
        elif count == 1:
            yield _Alone(stopped)
        else:
            with _processes(count, stopped) as workers:
                yield workers


class _Alone:
    """This process, one task after the other."""

    def __init__(self, stopped: Callable[[], str | None]) -> None:
        self.stopped = stopped

    def map(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        global _stopping
        before, _stopping = _stopping, self.stopped
        try:
            for task in tasks:
                if self.stopped():
                    return
                yield work(task)
        finally:
            _stopping = before


class _Pool:
    """Processes that stay for the whole run; they are started when first needed."""

    def __init__(
        self, pool: ProcessPoolExecutor, count: int, stop: Event, stopped: Callable[[], str | None]
    ) -> None:
        self.pool, self.count, self.stop, self._stopped = pool, count, stop, stopped

    def stopped(self) -> str | None:
        name = self._stopped()
        if name:
            self.stop.set()
        return name

    def map(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        left = iter(tasks)
        running: set[Future[R]] = set()
        while True:
            # No more than can run: what waits in the pool could not be called back.
            if not self.stopped():
                some = itertools.islice(left, self.count - len(running))
                running |= {self.pool.submit(work, task) for task in some}
            if not running:
                return
            finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                try:
                    yield future.result()
                except BrokenProcessPool:
                    raise UserError(
                        "a worker process was killed (out of memory?); run the same command "
                        "again, with fewer --workers if so"
                    ) from None


@contextmanager
def _processes(count: int, stopped: Callable[[], str | None]) -> Iterator[_Pool]:
    spawn = multiprocessing.get_context("spawn")
    stop = spawn.Event()
    with ProcessPoolExecutor(count, spawn, _begin, (stop,)) as pool:
        try:
            yield _Pool(pool, count, stop, stopped)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise


def _begin(stop: Event) -> None:
    """Ready a process: deaf to signals that its parent answers, gone with it."""
    global _stopping
    _stopping = stop.is_set
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def total(results: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Sums of the numbers that tasks returned, by name."""
    sums: dict[str, Any] = {}
    for result in results:
        for name, value in result.items():
            sums[name] = sums.get(name, 0) + value
    return sums
