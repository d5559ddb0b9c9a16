"""torch's own 4-bit kernel for the CPU, as an alternative to `quantised_linear.int4_linear`.

It leaves activations as they are and rounds scales and minima to x's type: in bf16 by up to 1/512.
Weights are laid out anew for it, as many bytes as before.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen2.model.packing import GROUP, unpack_int4

_ROWS = 16  # outputs, of which the kernel wants a multiple


def fits_torch(out_features: int) -> bool:
    """Whether the kernel takes a weight of so many rows."""
    return out_features % _ROWS == 0


def pack_int4_for_torch(
    weight: Tensor, scale: Tensor, minimum: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """uint8 (N, K / 2), scale and minimum (N, K / 32) -> its own weight, and (K / 32, N, 2).

    The latter are scale and value of the number 8, which torch's zero point stands for, in `dtype`,
    that of the activations to come.
    """
    packed = torch._convert_weight_to_int4pack_for_cpu(unpack_int4(weight).int(), 2)
    step = scale.float()
    middle = minimum.float() + 8 * step
    return packed, torch.stack((step.t(), middle.t()), dim=-1).to(dtype).contiguous()


def int4_linear_by_torch(x: Tensor, packed: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) times what `pack_int4_for_torch` has made -> (M, N); x in the type of `scales`."""
    y = torch._weight_int4pack_mm_for_cpu(x.contiguous(), packed, GROUP, scales)
    return y if bias is None else y + bias
