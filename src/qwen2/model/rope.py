"""Rotary position embedding (Su et al. 2021) and YARN (Peng et al. 2023; report section 2.2.1).

Unit i of the first half of a head is paired with unit i of the second half, as in the published
checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen2.model import kernels
from qwen2.model.config import Yarn

Table = tuple[Tensor, Tensor]
"""cos and sin of every token's angles, each (N, 1, D/2)."""

Rotary = tuple[Table, ...]
"""Tables of one forward pass: the first is for keys, the others are for queries."""


@dataclass(frozen=True)
class Rope:
    """The frequencies of the rotations: inv_i = θ^(-2i/D), i < D/2, or YARN's."""

    head_dim: int
    theta: float
    yarn: Yarn | None = None

    def frequencies(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """Radians per position of each pair of units, (D/2,)."""
        exponents = torch.arange(0, self.head_dim, 2, device=device).to(dtype)
        plain: Tensor = self.theta ** (-exponents / self.head_dim)
        return plain if self.yarn is None else yarn_frequencies(plain, self.theta, self.yarn)

    def table(self, positions: Tensor, dtype: torch.dtype) -> Table:
        """cos and sin for `positions` (N,): angles in fp32 at least, results (N, 1, D/2)."""
        wide = torch.promote_types(dtype, torch.float32)
        frequencies = self.frequencies(positions.device, wide)
        angles = positions.to(wide)[:, None, None] * frequencies  # (N, 1, D/2)
        cos, sin = angles.cos(), angles.sin()
        if self.yarn:
            factor = yarn_attention_factor(self.yarn)
            cos, sin = cos * factor, sin * factor
        return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, table: Table) -> Tensor:
    """Rotate every head of x (N, heads, D) by its token's angles."""
    cos, sin = table
    return kernels.TABLE["rotate"](x, cos, sin)


def yarn_frequencies(plain: Tensor, theta: float, yarn: Yarn) -> Tensor:
    """YARN's "NTK by parts": fast units stay as they are, slow ones are slowed by the factor s.

    With c(r) = d·ln(L0 / (2πr)) / (2·ln θ), the unit that turns r times within L0, the ramp rises
    from 0 at c(beta_fast) to 1 at c(beta_slow), and inv_i = plain_i·((1 - ramp_i) + ramp_i / s).
    """
    d = 2 * plain.numel()

    def unit(turns: float) -> float:
        wavelengths = yarn.original_max_position_embeddings / (2 * math.pi * turns)
        return d * math.log(wavelengths) / (2 * math.log(theta))

    low, high = unit(yarn.beta_fast), unit(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp
    units = torch.arange(d // 2, device=plain.device).to(plain.dtype)
    ramp = ((units - low) / (high - low)).clamp(0, 1)
    return plain * ((1 - ramp) + ramp / yarn.factor)


def yarn_attention_factor(yarn: Yarn) -> float:
    """What multiplies cos and sin, of queries and of keys: logits grow by its square."""
    if yarn.attention_factor is not None:
        return yarn.attention_factor
    return yarn_temperature(yarn.factor)


def yarn_temperature(factor: float) -> float:
    """0.1·ln s + 1, and 1 for contexts that are not extended (s <= 1)."""
    return 0.1 * math.log(max(factor, 1.0)) + 1.0
