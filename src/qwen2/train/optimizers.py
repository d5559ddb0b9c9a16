"""AdamW with decoupled weight decay (Loshchilov & Hutter 2019), none on norms and biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pydantic import Field
from torch import nn

from qwen2.common.config import Config
from qwen2.train.gradients import by_mesh


class AdamWConfig(Config):
    """AdamW, as a recipe gives it. The report states none of these; defaults are customary."""

    lr: float = Field(gt=0)  # at the peak of the schedule
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.AdamW:
        """The optimizer of named parameters; torch's fused kernel, on the CPU too."""
        return torch.optim.AdamW(
            parameter_groups(parameters, self.weight_decay),
            lr=self.lr,
            betas=self.betas,
            eps=self.eps,
            fused=True,
        )


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and norms and biases, which do not.

    Where parameters lie on different meshes, each has two: the kernel takes no list of both.
    """
    groups = []
    for some in by_mesh(parameters.values()):
        matrices = [p for p in some if p.ndim >= 2]
        vectors = [p for p in some if p.ndim < 2]
        groups += [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    return groups
