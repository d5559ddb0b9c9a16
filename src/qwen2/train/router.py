"""Losses of a mixture's routers in one training step, and what is logged of them.

The balance loss is what the published models were trained with (report section 2.2.2 leaves it to
its references; the coefficient is `router_aux_loss_coef` of their config.json); the z-loss is off
unless a recipe asks for it. Both stay out of the logged `loss`, the cross-entropy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwen2.model.config import Mixture
from qwen2.model.moe import Routing, expert_entropy, expert_share
from qwen2.train.world import World


class RouterLosses:
    """Of the micro-batches of a step with `tokens` tokens in all, each weighted by its share."""

    def __init__(self, moe: Mixture, z_coefficient: float, tokens: int) -> None:
        self.moe, self.z_coefficient, self.tokens = moe, z_coefficient, tokens
        self.balance = self.z = 0.0
        self.dropped = 0
        self.counts = torch.zeros(moe.num_experts, dtype=torch.long)

    def add(self, routing: Routing, tokens: int) -> Tensor:
        """Take in a micro-batch of `tokens`; returns what it adds to the loss."""
        weight = tokens / self.tokens
        balance, z = routing.balance_loss(), routing.z_loss()
        self.balance += weight * balance.item()
        self.z += weight * z.item()
        self.dropped += routing.dropped()
        self.counts += routing.counts.cpu()
        return weight * (self.moe.router_aux_loss_coef * balance + self.z_coefficient * z)

    def figures(self, world: World) -> dict[str, Any]:
        """Keys of the metrics line, over all layers, micro-batches and ranks."""
        parts = torch.tensor([self.balance, self.z], dtype=torch.float64)
        balance, z = world.sum(parts, "stage").tolist()
        return {
            "balance_loss": balance,
            "router_z_loss": z,
            "expert_share": [round(share, 6) for share in expert_share(self.counts).tolist()],
            "expert_entropy": expert_entropy(self.counts),
            "dropped": self.dropped,
        }


def share_counts(routing: Routing, world: World) -> None:
    """Count in `routing`, of one pass, what the routers of all ranks did, each with its own tokens.

    The shares f_e of the balance loss are then those of all tokens. Sums with gradients stay this
    rank's: its losses are its parts of those of all tokens, and add up over `stage`.
    """
    ranks = world.mesh.world_size // world.mesh.pp  # all with as many tokens
    routing.counts = world.sum(routing.counts, "stage")
    routing.tokens *= ranks
    routing.pairs *= ranks
