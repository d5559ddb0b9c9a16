"""Ranks for the tests of parallelism: processes that run a test's function together.

A function runs in all ranks of a group of gloo processes on this machine, which stay for the tests
to come: importing torch takes longer than any of these tests.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

SECONDS = 120  # for one function, on a machine that has other things to do

Function = Callable[..., Any]


class Ranks:
    """`count` processes, each of which waits for functions to run."""

    def __init__(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["qwen2.train.stage", "torch.distributed.fsdp", "pytest"])
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.calls = 0
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, count, port), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Function, *args: Any) -> list[Any]:
        """What `function(*args)` returns in each rank; a failure of any of them is raised."""
        self.calls += 1
        for pipe in self.pipes:
            pipe.send((function.__code__.co_filename, function.__name__, args))
        answers: dict[int, Any] = {}
        while len(answers) < len(self.pipes):
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in answers]
            ready = wait(waiting, SECONDS)
            if not ready:
                raise TimeoutError(f"ranks {set(range(len(self.pipes))) - set(answers)} are silent")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                good, answers[rank] = pipe.recv()  # type: ignore[union-attr]
                if not good:
                    raise AssertionError(f"rank {rank}:\n{answers[rank]}")
        return [answers[rank] for rank in range(len(self.pipes))]

    def end(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


def _serve(pipe: Connection, rank: int, count: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=SECONDS),
    )
    modules: dict[str, Any] = {}
    while True:
        try:
            path, name, args = pipe.recv()
        except EOFError:
            return
        try:
            if path not in modules:
                spec = importlib.util.spec_from_file_location(Path(path).stem, path)
                assert spec is not None
                assert spec.loader is not None
                modules[path] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(modules[path])
            pipe.send((True, getattr(modules[path], name)(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
