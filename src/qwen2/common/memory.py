"""Memory that a process has freed and still holds."""

from __future__ import annotations

import ctypes

import pyarrow as pa


def release_freed_memory() -> None:
    """Give freed memory back to the system, as far as its allocators can.

    Between two stages of a run: what the next one takes would else come on top of holes that the
    one before has left.
    """
    pa.default_memory_pool().release_unused()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)
