"""The SwiGLU feed-forward layer (Dauphin et al. 2017; report section 2.2.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2.model.linear import Linear, Projections


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without bias."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = Linear(intermediate_size, hidden_size, bias=False)
        self.projections = Projections(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C) -> (N, C)."""
        gate, up = self.projections(x)
        if torch.is_grad_enabled():
            return self.down_proj(F.silu(gate) * up)
        return self.down_proj(F.silu(gate, inplace=True).mul_(up))  # fresh memory costs a tenth
