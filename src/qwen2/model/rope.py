"""Rotary position embedding (Su et al. 2021; report section 2.2.1).

Unit i of the first half of a head is paired with unit i of the second half, as in the published
checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Rotary = tuple[Tensor, Tensor]
"""cos and sin of every token's angles, each (N, 1, D/2)."""


@dataclass(frozen=True)
class Rope:
    """The frequencies of the rotations: inv_i = θ^(-2i/D), i < D/2."""

    head_dim: int
    theta: float

    def tables(self, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """cos and sin for `positions` (N,); angles in fp32, results (N, 1, D/2) in `dtype`."""
        exponents = torch.arange(0, self.head_dim, 2, device=positions.device).float()
        frequencies = self.theta ** (-exponents / self.head_dim)  # (D/2,)
        angles = positions.float()[:, None, None] * frequencies  # (N, 1, D/2)
        return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate every head of x (N, heads, D) by its token's angles."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)  # (N, heads, D/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
