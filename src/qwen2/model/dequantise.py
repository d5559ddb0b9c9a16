"""Quantised blocks of GGUF files to numbers.

The types of the usual files (Q4_K_M and its kin) are done in torch, several times faster than the
`gguf` package, which does the others and is the reference for all of them in the tests.
"""

from __future__ import annotations

import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type
from gguf.quants import dequantize as reference
from torch import Tensor


def can_dequantise(type_: Type) -> bool:
    """Whether `type_` is a number format of weights: I32, for one, is not."""
    _, size = GGML_QUANT_SIZES[type_]
    try:
        reference(np.zeros((1, size), np.uint8), type_)
    except NotImplementedError:
        return False
    return True


def dequantise(rows: Tensor, type_: Type) -> Tensor:
    """Rows of blocks (R, bytes), uint8 -> numbers (R, columns), fp32."""
    return torch.from_numpy(reference(rows.numpy(), type_))
