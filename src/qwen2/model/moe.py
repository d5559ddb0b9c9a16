"""Mixture of experts in place of the MLP (report section 2.2.2), its statistics and its losses.

    p = softmax(W_g x),   y = Σ_{i in top-k(p)} p_i E_i(x) + sigmoid(w_s · x) S(x)

Many narrow routed experts E_i, and shared ones that see every token, which are one MLP S. The
router computes in fp32, product and softmax. Nothing is ever dropped: an expert takes as many
tokens as are sent to it.

A caller who wants to know where tokens go, or to train the router towards balance, makes a
`Routing` and hands it down with the tokens; every layer adds to it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2.model.config import Mixture, ModelConfig
from qwen2.model.experts import grouped_experts
from qwen2.model.linear import Linear
from qwen2.model.mlp import MLP
from qwen2.model.quantised_linear import QuantisedExperts


class Experts(nn.Module):
    """The weights of all routed experts, stacked; files hold them one by one, see stacks.py."""

    def __init__(self, moe: Mixture, hidden_size: int, std: float) -> None:
        super().__init__()
        E, I, C = moe.num_experts, moe.moe_intermediate_size, hidden_size  # noqa: E741
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * I, C))
        self.down_proj = nn.Parameter(torch.empty(E, C, I))
        nn.init.normal_(self.gate_up_proj, std=std)
        nn.init.normal_(self.down_proj, std=std)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (N, C), its experts' ids and weights (N, k) -> (N, C)."""
        return grouped_experts(x, self.gate_up_proj, self.down_proj, ids, weights)


class MoE(nn.Module):
    """Router, routed experts and, where they have a width, shared ones behind a gate."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.moe is not None
        self.config, C, bits = config.moe, config.hidden_size, config.quantisation
        self.gate = Linear(C, self.config.num_experts, bias=False)
        self.experts: Experts | QuantisedExperts
        if bits is None:
            self.experts = Experts(self.config, C, config.initializer_range)
        else:
            self.experts = QuantisedExperts(
                self.config.num_experts, C, self.config.moe_intermediate_size, bits
            )
        self.shared_expert: MLP | None = None
        if width := self.config.shared_expert_intermediate_size:
            self.shared_expert = MLP(C, width, bits)
            self.shared_expert_gate = Linear(C, 1, bias=False)

    def forward(self, x: Tensor, routing: Routing | None = None) -> Tensor:
        """x (N, C) -> (N, C); what the router did is added to `routing`."""
        logits = router_logits(x, self.gate.weight)
        probabilities, ids, weights = route(logits, self.config)
        if routing is not None:
            routing.add(logits, probabilities, ids)
        y = self.experts(x, ids, weights.to(x.dtype))
        if self.shared_expert is not None:
            y = y + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y


def router_logits(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, C), weight (E, C) -> (N, E), in fp32: in bf16 near ties would go either way."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.linear(x.to(dtype), weight.to(dtype))


def route(logits: Tensor, moe: Mixture) -> tuple[Tensor, Tensor, Tensor]:
    """logits (N, E) -> probabilities (N, E), ids and weights (N, k) of the experts chosen."""
    probabilities = logits.softmax(-1)
    weights, ids = probabilities.topk(moe.num_experts_per_tok, dim=-1)  # (N, k)
    if moe.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return probabilities, ids, weights


class Routing:
    """What the routers of all layers did with the tokens of one pass; sums keep their gradients."""

    def __init__(self, moe: Mixture, device: torch.device) -> None:
        E = moe.num_experts
        self.counts = torch.zeros(E, dtype=torch.long, device=device)  # pairs each expert computed
        self.probabilities = torch.zeros(E, device=device)  # sums over tokens
        self.square_logsumexp = torch.zeros((), device=device)  # sum over tokens
        self.tokens = 0  # of all layers: a token counts once in each
        self.pairs = 0  # of token and expert, as routers chose them

    def add(self, logits: Tensor, probabilities: Tensor, ids: Tensor) -> None:
        """A layer's logits and probabilities (N, E), and ids (N, k) of the experts chosen."""
        self.counts = self.counts + torch.bincount(ids.flatten(), minlength=len(self.counts))
        self.probabilities = self.probabilities + probabilities.sum(0)
        self.square_logsumexp = self.square_logsumexp + logits.logsumexp(-1).square().sum()
        self.tokens += len(logits)
        self.pairs += ids.numel()

    def balance_loss(self) -> Tensor:
        """E · Σ_e f_e P_e (Fedus et al. 2021, equations 4 to 6), over the tokens of all layers.

        f_e is the share of tokens that expert e computed, P_e its mean probability. f is not
        divided by k, as in transformers: uniform routing gives k.
        """
        E = len(self.counts)
        return E * (self.counts / self.tokens * self.probabilities / self.tokens).sum()

    def z_loss(self) -> Tensor:
        """Mean over tokens of logsumexp(logits)² (ST-MoE, Zoph et al. 2022, equation 5)."""
        return self.square_logsumexp / self.tokens

    def dropped(self) -> int:
        """Pairs that routers chose and no expert computed: none, as experts have no capacity."""
        return self.pairs - int(self.counts.sum())


def expert_share(counts: Tensor) -> Tensor:
    """Share of all pairs that each expert computed (E,); sums to 1."""
    return counts / counts.sum()


def expert_entropy(counts: Tensor) -> float:
    """Entropy of the share over ln E: 1 when all experts compute as much, 0 when one does all."""
    if len(counts) == 1:
        return 1.0
    entropy = torch.special.entr(expert_share(counts.double())).sum() / math.log(len(counts))
    return min(1.0, max(0.0, float(entropy)))  # rounding may leave the interval
