"""Mixed precision, chosen in one place: a model in the compute dtype, its weights also in fp32.

The model holds bf16 copies of fp32 masters; the optimizer sees only the masters. Against autocast
over fp32 parameters this spares the casts of every weight and every norm in each pass; both give
the same loss curve (benchmarks/training.py). In fp32 the masters are the model's own parameters;
so they are where ranks share them: they stay in fp32, and FSDP gathers them in bf16.
"""

from __future__ import annotations

import torch
from torch import nn


class MasterWeights:
    """The fp32 weights behind `model`, which is turned into `dtype` in place.

    Gradients of several micro-batches add up in fp32.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._shared = dtype == torch.float32
        if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
            model.float()
        named = dict(model.named_parameters())
        self.masters: dict[str, nn.Parameter] = (
            named
            if self._shared
            else {name: nn.Parameter(p.detach().clone()) for name, p in named.items()}
        )
        """By published name; a tied head is there once."""
        if not self._shared:
            model.to(dtype)
        self._model = dict(model.named_parameters())

    @torch.no_grad()
    def collect_gradients(self) -> None:
        """Move the model's gradients to the masters, adding to what is there."""
        if self._shared:
            return
        for name, parameter in self._model.items():
            master, gradient = self.masters[name], parameter.grad
            if gradient is None:
                continue
            if master.grad is None:
                master.grad = gradient.float()
            else:
                master.grad += gradient
            parameter.grad = None

    @torch.no_grad()
    def drop_gradients(self) -> None:
        """Forget all gradients."""
        for parameter in (*self.masters.values(), *self._model.values()):
            parameter.grad = None

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the model."""
        if not self._shared:
            for name, parameter in self._model.items():
                parameter.copy_(self.masters[name])
