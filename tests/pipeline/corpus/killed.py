"""Runs a recipe again and again, each time killed at another call of the file system.

    python killed.py SOURCES OUT SEED

Prints how often it was killed, and after how many calls each time. Children are forked, so that
the imports are paid once; this process does nothing but wait.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import small

from qwen2.pipeline.corpus import CorpusRecipe, run_corpus
from qwen2.pipeline.workers import open_workers

CALLS = ("rename", "replace", "fsync", "mkdir", "unlink")


def kill_at(call: int) -> None:
    """Let the process be killed before its call number `call`."""
    count = itertools.count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*args: Any, **keywords: Any) -> Any:
            if next(count) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **keywords)

        return counting

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def main(sources: Path, out: Path, seed: int) -> None:
    rng = random.Random(seed)
    calls = []
    while True:
        call = rng.randint(1, 20 + 3 * len(calls))  # a join makes a hundred calls in one go
        child = os.fork()
        if child == 0:
            kill_at(call)
            sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the end
            recipe = CorpusRecipe.parse(small.recipe_values(sources))
            with open_workers(1) as workers:
                run_corpus(recipe, out, workers)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFEXITED(status):
            if os.WEXITSTATUS(status):
                sys.exit(f"failed after {calls}")
            print(len(calls), *calls)
            return
        calls.append(call)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
