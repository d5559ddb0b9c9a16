"""What every checkpoint format gives: tensors that can be read, in part."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class StoredTensor(Protocol):
    """A tensor in a file, not yet read."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, known from the file's header."""

    @property
    def dtype(self) -> torch.dtype | None:
        """The number type in which it can be mapped as it is; None when it is quantised."""

    def mapped(self) -> Tensor:
        """The whole tensor as a private mapping of the file; only where `dtype` is not None."""

    def read_rows(self, start: int, out: Tensor) -> None:
        """Fill `out` (rows, width) with the rows from `start` on, in out's type, on its device.

        Rows are of the last dimension, whatever dimensions come before it; a vector is one block.
        """
