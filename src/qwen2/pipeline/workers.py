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
from multiprocessing.connection import Connection
from multiprocessing.connection import wait as wait_for
from typing import Any, Literal, Protocol, TypeVar

from qwen2.common.errors import UserError
from qwen2.common.signals import stop_on_signals

Engine = Literal["local", "ray"]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
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
        """What `work` returns for each task, as they finish; `work` can be pickled.

        An error of a task is raised here as it was raised there, and ends the iteration.
        """


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
    """Processes that stay for the whole run; they are started when first needed.

    Two pipes tell them what to do, by being closed: unlike an `Event`, a pipe has no lock that a
    process which is killed could take with it, and the kernel closes it when this process dies.
    """

    def __init__(self, count: int, stopped: Callable[[], str | None]) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.count, self._stopped = count, stopped
        told, self._go_on = spawn.Pipe(duplex=False)
        held, self._leash = spawn.Pipe(duplex=False)
        self._ends = told, held
        self._pool = ProcessPoolExecutor(count, spawn, _begin, (told, held))
        self._processes: set[multiprocessing.process.BaseProcess] = set()

    def stopped(self) -> str | None:
        name = self._stopped()
        if name:
            self.ask_to_stop()
        return name

    def ask_to_stop(self) -> None:
        """Let `stopping()` be true in all processes."""
        self._go_on.close()

    def map(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        left = iter(tasks)
        running: set[Future[R]] = set()
        try:
            while True:
                # No more than can run: what waits in the pool could not be called back.
                if not self.stopped():
                    for task in itertools.islice(left, self.count - len(running)):
                        running.add(self._submit(work, task))
                if not running:
                    return
                finished, running = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
                # The pool overlooks the end of a process that it started while it was waiting.
                if not finished and wait_for([p.sentinel for p in self._processes], timeout=0):
                    raise BrokenProcessPool
        except BrokenProcessPool:
            self._leash.close()  # the others would wait for a lock that the dead one holds
            raise UserError(
                "a worker process was killed (out of memory?); run the same command "
                "again, with fewer --workers if so"
            ) from None
        finally:
            for future in running:
                future.cancel()

    def _submit(self, work: Callable[[T], R], task: T) -> Future[R]:
        """Also starts a process, if there are too few: deaf to signals from its very beginning."""
        others = set(multiprocessing.active_children()) - self._processes
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return self._pool.submit(work, task)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            self._processes |= set(multiprocessing.active_children()) - others

    def close(self, at_once: bool = False) -> None:
        """End all processes: when what they have begun is done, or `at_once`."""
        if at_once:
            self._leash.close()
        self._pool.shutdown(cancel_futures=True)
        for end in (*self._ends, self._go_on, self._leash):
            end.close()


@contextmanager
def _processes(count: int, stopped: Callable[[], str | None]) -> Iterator[_Pool]:
    pool = _Pool(count, stopped)
    try:
        yield pool
    except Exception:
        pool.ask_to_stop()
        raise
    except BaseException:  # the second Ctrl-C
        pool.close(at_once=True)
        raise
    finally:
        pool.close()


def _begin(told: Connection, held: Connection) -> None:
    """Ready a process: deaf to signals that its parent answers, gone with it."""
    global _stopping
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    stop = threading.Event()
    _stopping = stop.is_set

    def follow() -> None:
        if held not in wait_for([told, held]):
            stop.set()
            wait_for([held])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def total(results: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Sums of the numbers that tasks returned, by name."""
    sums: dict[str, Any] = {}
    for result in results:
        for name, value in result.items():
            sums[name] = sums.get(name, 0) + value
    return sums
