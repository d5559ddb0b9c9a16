"""Work for the workers of test_workers.py: their processes import it by this name."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from qwen2.common.errors import UserError
from qwen2.pipeline.workers import stopping

PATIENCE = 20.0  # seconds before a test gives up


def square(number: int) -> int:
    return number * number


def refuse(number: int) -> int:
    if number == 3:
        raise UserError(f"{number}: not this one")
    return number


def stay(folder: Path, name: str) -> str:
    """Begun: a file; then until asked to stop, which a second file tells."""
    (folder / f"{name}.begun").write_text(str(os.getpid()))
    end = time.monotonic() + PATIENCE
    while not stopping() and time.monotonic() < end:
        time.sleep(0.01)
    (folder / f"{name}.ended").write_text("asked" if stopping() else "tired")
    return name


def die_or_stay(folder: Path, name: str) -> str:
    if name == "dies":
        while not (folder / "other.begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
    return stay(folder, name)


def sleep(folder: Path, name: str) -> str:
    """Deaf to `stopping`."""
    (folder / f"{name}.begun").write_text(str(os.getpid()))
    time.sleep(PATIENCE)
    return name


def await_files(folder: Path, pattern: str, count: int) -> list[Path]:
    end = time.monotonic() + PATIENCE
    while len(found := list(folder.glob(pattern))) < count:
        assert time.monotonic() < end, f"no {count} {pattern}"
        time.sleep(0.01)
    return found


def note(folder: Path, number: int) -> int:
    (folder / str(number)).touch()
    return number


def signal_or_stay(folder: Path, number: signal.Signals, name: str) -> str:
    if name == "a":
        await_files(folder, "b.begun", 1)
        os.kill(os.getppid(), number)
    return stay(folder, name)
