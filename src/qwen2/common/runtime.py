"""What a run computes on: device, number type, threads. Asked for when needed, never at import."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch

from qwen2.common.cores import available_cores as available_cores
from qwen2.common.errors import UserError
from qwen2.common.progress import say

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def parse_dtype(name: str) -> torch.dtype:
    """The torch dtype of `fp32`, `bf16` or `fp16` (long names too).

    Raises:
        UserError: any other name.
    """
    long = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}
    try:
        return (DTYPES | long)[name]
    except KeyError:
        raise UserError(f"dtype {name!r}: choose one of {', '.join(DTYPES)}") from None


def training_dtype(device: torch.device) -> Literal["bf16", "fp32"]:
    """What a small run computes fastest in: bf16, where the device has products of it."""
    fast = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"


@contextlib.contextmanager
def fp32_products(rounded: bool, device: torch.device) -> Iterator[None]:
    """Where `rounded`, let products of fp32 matrices round what they multiply until this is left.

    To bf16 on the CPU, to TF32 on CUDA; sums, and all that is no product, stay in fp32. Where the
    device cannot, a line says so and products stay as they are.
    """
    if not rounded:
        yield
        return
    backends: Any = torch.backends  # whose types leave this out
    if device.type == "cuda":
        backend, mode = backends.cuda.matmul, "tf32"
        able = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        backend, mode = backends.mkldnn.matmul, "bf16"
        able = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not able:
        say(f"matmul: this device has no products of {mode}; those of fp32 stay exact")
    before = backend.fp32_precision
    backend.fp32_precision = mode
    try:
        yield
    finally:
        backend.fp32_precision = before


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` takes CUDA where there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r}: choose auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device {name!r}: no CUDA device here; choose cpu")
    return device


def set_threads(count: int | None) -> int:
    """Use `count` threads for torch's operators (None: leave as is); returns the number in use."""
    if count is not None:
        if count < 1:
            raise UserError(f"threads {count}: at least 1")
        torch.set_num_threads(count)
    return torch.get_num_threads()


def free_memory(device: torch.device) -> int:
    """Bytes that may still be taken on `device`, as far as its system tells.

    On the CPU, files that are held in memory count as free; in a container with a limit, its own.
    """
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(1024 * int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = 8 << 30  # a system without /proc: what a laptop has
    with contextlib.suppress(OSError, ValueError, KeyError):  # no container, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        files = int(stat["active_file"]) + int(stat["inactive_file"])
        free = min(free, limit - used + files)
    return max(free, 0)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process ever held, of tensors on CUDA and of all on the CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # getrusage begins with the peak of the process that started this one.
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def keep_freed_memory(most: int = 2**31 - 1) -> None:
    """Let glibc keep freed blocks, `most` bytes of them, for the next allocation; without it
    nothing happens.

    It maps every tensor above 32 MiB anew, whose pages the kernel then clears one by one: 8 % of a
    training step on the CPU. The process gives less back in between, and holds more than lives: up
    to a fifth in a run of one process, up to twice as much on each of several ranks.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, most)


def on_huge_pages(tensor: torch.Tensor) -> torch.Tensor:
    """Ask for huge pages within a new tensor on the CPU, before it is filled; returns it.

    Weights on them are read up to twice as fast, which is what decoding is bound by. Only whole
    ones are asked for: PyTorch's own way (`THP_MEM_ALLOC_ENABLE`) rounds each tensor up to 2 MiB.
    """
    MADV_HUGEPAGE, huge = 14, 1 << 21
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    begin = -(-tensor.data_ptr() // huge) * huge
    length = (tensor.data_ptr() + tensor.nbytes - begin) // huge * huge
    if madvise is not None and tensor.device.type == "cpu" and length > 0:
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), MADV_HUGEPAGE)
    return tensor


def in_threads(work: Callable[..., None], items: Sequence[tuple[Any, ...]]) -> None:
    """Call `work` with each of `items`, a thread for each of torch's and each on its own.

    Torch's threads would meet after every small operator; apart, they take half the time. The work
    is done without gradients, and in inference mode where the caller is.
    """
    threads, inference = torch.get_num_threads(), torch.is_inference_mode_enabled()

    def quietly(item: tuple[Any, ...]) -> None:  # both modes are each thread's own
        with torch.inference_mode() if inference else torch.no_grad():
            work(*item)

    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for _ in pool.map(quietly, items):
                pass
    finally:
        torch.set_num_threads(threads)
