"""How many processor cores there are to work on; apart from runtime.py, which imports torch."""

from __future__ import annotations

import os


def available_cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
