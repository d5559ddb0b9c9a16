"""What a measurement was made on."""

from __future__ import annotations

import platform
from pathlib import Path

from qwen2.common.cores import available_cores


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hardware() -> str:
    """The processor's name and the cores in use."""
    return f"{processor()}, {available_cores()} cores"
