"""The SwiGLU feed-forward layer (Dauphin et al. 2017; report section 2.2.1)."""

from __future__ import annotations

from torch import Tensor, nn

from qwen2.model import kernels
from qwen2.model.config import Quantisation
from qwen2.model.linear import Projections
from qwen2.model.quantised_linear import linear_layer


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), without bias."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, quantisation: Quantisation | None = None
    ) -> None:
        super().__init__()
        self.gate_proj = linear_layer(hidden_size, intermediate_size, False, quantisation)
        self.up_proj = linear_layer(hidden_size, intermediate_size, False, quantisation)
        self.down_proj = linear_layer(intermediate_size, hidden_size, False, quantisation)
        self.projections = Projections(self.gate_proj, self.up_proj)

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C) -> (N, C)."""
        joint = self.projections.together(x)
        if joint is None:
            gate, up = self.projections(x)
            return self.down_proj(kernels.TABLE["gate"](gate, up))
        return self.down_proj(kernels.TABLE["swiglu"](joint))
