"""Stopping in good order: SIGTERM, SIGUSR1 and Ctrl-C let the current step finish.

SIGUSR1 is what Slurm sends before the time of a job is over, when asked to.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[Callable[[], str | None]]:
    """Inside the block these signals are only noted: the yielded function says which came.

    The second signal has its usual effect. Outside the main thread, where Python can set no
    handlers, nothing is caught.
    """
    caught: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)
        signal.signal(number, before[signal.Signals(number)])

    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in before:
        signal.signal(number, note)
    try:
        yield lambda: caught[0] if caught else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
