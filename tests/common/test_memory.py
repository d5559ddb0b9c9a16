import ctypes
from pathlib import Path

import pytest

from qwen2.common.memory import release_freed_memory

LIBC = ctypes.CDLL(None)


def resident() -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in x)
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="needs glibc")
def test_holes_below_what_is_in_use_are_given_back() -> None:
    LIBC.malloc.restype, LIBC.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size, count = 100_000, 1000  # each small enough to be on the heap
    blocks = [LIBC.malloc(size) for _ in range(count + 1)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    *holes, last = blocks
    for block in holes:
        LIBC.free(block)
    before = resident()
    release_freed_memory()
    assert before - resident() > size * count * 0.8
    LIBC.free(last)
