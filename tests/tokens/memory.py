"""Documents in memory, for the tests of loaders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass
class Memory:
    """Documents whose every token has a number of its own, from `first` on."""

    sizes: list[int]
    first: int = 0
    fingerprint: str = "memory"
    lengths: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.array(self.sizes, dtype=np.int64)
        self.starts = self.first + np.cumsum([0, *self.sizes])

    def document(self, number: int, /) -> NDArray[Any]:
        return np.arange(self.starts[number], self.starts[number + 1], dtype=np.uint32)
