"""Optimizers, as a recipe gives them: AdamW, and Muon for the hidden matrices.

AdamW is that of Loshchilov & Hutter 2019, without decay on norms and biases. Muon (Jordan et al.
2024) replaces the averaged gradient of a matrix by a nearly orthogonal one, UVᵀ of its singular
value decomposition. As in Moonlight (Liu et al. 2025, equation 4) the update of an m x n matrix is
scaled by 0.2·sqrt(max(m, n)): its root mean square is then that of a usual step of AdamW, so that
both share one learning rate and one weight decay. Embedding, head, norms, biases and the gate of
the shared expert (a vector) stay with AdamW.

Differences to `torch.optim.Muon`, which takes matrices alone: experts, stacked as (E, m, n), are E
matrices, orthogonalised together; gate and up, which share a tensor there, are two of them, as in
the published files. On the CPU the iteration is in fp32, for many processors have no products of
bf16.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from qwen2.common.config import Config
from qwen2.train.gradients import by_mesh


class AdamWSettings(Config):
    """What both need. The report states none of these; defaults are customary."""

    lr: float = Field(gt=0)  # at the peak of the schedule
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)


class AdamWConfig(AdamWSettings):
    """AdamW for everything."""

    kind: Literal["adamw"] = "adamw"

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of named parameters."""
        return _adamw(self, parameter_groups(parameters, self.weight_decay))


class MuonConfig(AdamWSettings):
    """Muon for the hidden matrices and AdamW for the rest."""

    kind: Literal["muon"] = "muon"
    momentum: float = Field(default=0.95, ge=0, lt=1)  # of Muon

    def build(self, parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        """The optimizer of named parameters."""
        hidden, rest = hidden_matrices(parameters)
        groups = [
            {"params": list(group.values()), "parts": parts, "weight_decay": self.weight_decay}
            for parts, group in hidden.items()
        ]
        adamw = _adamw(self, parameter_groups(rest, self.weight_decay))
        return Muon(groups, adamw, lr=self.lr, momentum=self.momentum)


def _with_kind(values: Any) -> Any:
    """Recipes name no optimizer when it is AdamW."""
    return {"kind": "adamw"} | values if isinstance(values, dict) else values


OptimizerConfig = Annotated[
    Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")], BeforeValidator(_with_kind)
]


def _adamw(settings: AdamWSettings, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
    """torch's fused kernel, on the CPU too."""
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
    )


def parameter_groups(
    parameters: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and norms and biases, which do not.

    Where parameters lie on different meshes, each has two: the kernel takes no list of both.
    """
    groups = []
    for some in by_mesh(parameters.values()) or [[]]:
        matrices = [p for p in some if p.ndim >= 2]
        vectors = [p for p in some if p.ndim < 2]
        groups += [
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
    return groups


def hidden_matrices(
    parameters: Mapping[str, nn.Parameter],
) -> tuple[dict[int, dict[str, nn.Parameter]], dict[str, nn.Parameter]]:
    """Parameters that Muon steps, by the matrices that share their rows, and those it does not."""
    hidden: dict[int, dict[str, nn.Parameter]] = {}
    rest: dict[str, nn.Parameter] = {}
    for name, parameter in parameters.items():
        outer = name.endswith(("embed_tokens.weight", "lm_head.weight"))
        if outer or parameter.ndim < 2 or min(parameter.shape[-2:]) == 1:
            rest[name] = parameter
        else:
            parts = 2 if name.endswith("gate_up_proj") else 1
            hidden.setdefault(parts, {})[name] = parameter
    return hidden, rest


class Muon(torch.optim.Optimizer):
    """Steps its own groups by Muon and those of `adamw` by that; one object with one state.

    Args:
        groups: of matrices (m, n) or stacks of such (E, m, n), each with its `weight_decay`, and
            `parts`: how many matrices lie one below the other in the m rows.
        adamw: of all other parameters; its groups become groups of this optimizer.
        lr, momentum: of the groups.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        adamw: torch.optim.Optimizer,
        lr: float,
        momentum: float,
    ) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum})
        self._own, self._adamw = list(self.param_groups), adamw
        self.param_groups += adamw.param_groups
        adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self._own:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        self._adamw.step()

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[parameter], group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = gradient.lerp(average, momentum)  # Nesterov's
        matrices = update.unflatten(-2, (group["parts"], -1))  # (..., parts, m, n)
        turned = orthogonalise(matrices).flatten(-3, -2).to(parameter.dtype)
        scale = 0.2 * math.sqrt(max(matrices.shape[-2:]))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(turned, alpha=-group["lr"] * scale)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Each of `matrices` (..., m, n) with its singular values moved near 1 (0.7 to 1.2).

    By the quintic Newton-Schulz iteration of Jordan et al. 2024, X <- aX + (bA + cA²)X, A = XXᵀ,
    with their coefficients; singular values below about 1e-3 of the norm do not get there.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices if matrices.device.type == "cpu" else matrices.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
