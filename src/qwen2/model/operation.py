"""An operation that several kernels can do: which one does it, and how long each takes here.

All of them give the same result but for rounding. The table of operations is in kernels.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

DEVICES = ("cpu", "cuda")
ROUNDS = 8
SECONDS = 0.1  # of one kernel, after which it is called no more; but twice in any case


def _anything(*_: Any) -> bool:
    return True


def _as_they_are(*operands: Any) -> tuple[Any, ...]:
    return operands


@dataclass(frozen=True)
class Kernel:
    """One way to do an operation.

    takes: whether it can be used for these operands, on this machine.
    prepare: operands as it wants them, made once; what is measured is what comes after it.
    never: why it is measured and shown, but not used.
    """

    run: Callable[..., Any]
    takes: Callable[..., bool] = _anything
    prepare: Callable[..., tuple[Any, ...]] = _as_they_are
    never: str = ""


@dataclass
class Operation:
    """A thing to be done.

    about: what, in a few words.
    plain: name and kernel of the reference in PyTorch, which takes everything, everywhere.
    fast: the other kernels by the type of device, the best first as far as one knows.
    operands: of a usual size on a device, to measure with; the first says where the work is done.
    compiled: what does it instead while gradients are recorded, see train/compiling.py.
    """

    about: str
    plain: tuple[str, Kernel]
    fast: Mapping[str, Mapping[str, Kernel]]
    operands: Callable[[torch.device], tuple[Any, ...]]
    microseconds: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """By device, of each kernel that was measured; None: it cannot be used there."""
    compiled: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        self.kernels = {device: dict(self.fast.get(device, ())) for device in DEVICES}
        for some in self.kernels.values():
            some.update([self.plain])
        self.forget()

    def forget(self) -> None:
        """What is known without measuring."""
        self.microseconds = {}
        self.order = {
            device: [name for name, kernel in some.items() if not kernel.never]
            for device, some in self.kernels.items()
        }

    def learn(self, device: str, times: dict[str, float | None]) -> None:
        """Prefer the fastest."""
        known = {n: t for n, t in times.items() if t and not self.kernels[device][n].never}
        self.microseconds[device] = times
        self.order[device] = sorted(known, key=known.__getitem__)

    def pick(self, *operands: Any) -> str:
        """The name of the kernel for these operands: the fastest that takes them."""
        device = operands[0].device.type
        for name in self.order.get(device, ()):
            if self.kernels[device][name].takes(*operands):
                return name
        return self.plain[0]

    def __call__(self, *operands: Any) -> Any:
        """Do it."""
        if self.compiled is not None and torch.is_grad_enabled():
            return self.compiled(*operands)
        device = operands[0].device.type
        for name in self.order.get(device, ()):
            kernel = self.kernels[device][name]
            if kernel.takes(*operands):
                return kernel.run(*operands)
        return self.plain[1].run(*operands)

    def measure(self, device: torch.device) -> dict[str, float | None]:
        """Microseconds of each kernel, the best of calls taken in turn; None: not usable.

        The best, not the median: the first call is slow, whoever else computes here makes others
        slower, and what is chosen now is kept. A processor without instructions for bf16 or int8
        takes seconds for one call: there two are enough.
        """
        operands = self.operands(device)
        kernels = self.kernels[device.type]
        prepared = {n: k.prepare(*operands) for n, k in kernels.items() if k.takes(*operands)}
        times: dict[str, list[float]] = {name: [] for name in prepared}
        for _ in range(ROUNDS):
            for name, some in times.items():
                if len(some) > 1 and sum(some) > SECONDS:
                    continue
                began = time.perf_counter()
                kernels[name].run(*prepared[name])
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                some.append(time.perf_counter() - began)
        best = {name: round(min(some) * 1e6, 1) for name, some in times.items()}
        return {name: best.get(name) for name in kernels}
