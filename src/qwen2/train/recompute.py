"""Activation checkpointing: some activations are computed again in the backward pass, not kept.

`full` keeps the input of each layer alone (Chen et al. 2016): about a third more products.
`selective` keeps what products and attention return and computes the rest again, which is cheap:
norms, rotations, silu(gate) · up (Korthikanti et al. 2022 choose so by cost, if other operators).
Losses and gradients stay the same bits, since the same operators run on the same numbers.

Applied to the layers from outside. A mixture's layer adds to its `Routing` again when it is
computed again, so that must have been read before the backward pass, as train_step does.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from qwen2.model.decoder import Qwen2

Recompute = Literal["none", "selective", "full"]

aten = torch.ops.aten
KEPT = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
"""Operators whose results `selective` keeps."""
KEPT_BY_NAME = {"torch_attn::_varlen_attn"}
"""The same, of those that are registered when they are first used."""

MARKS = {
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
}
"""What FSDP tells a profiler where it gathers routed experts, in the middle of a layer."""


def recompute_activations(model: Qwen2, how: Recompute) -> None:
    """Let the layers of `model` compute activations again in the backward pass; in place."""
    if how == "none":
        return
    settings: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if how == "selective":
        # torch counts operators, and FSDP has other work when a layer is computed again.
        SAC_IGNORED_OPS.update(MARKS)
        settings["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _policy)
    for layer in model.model.layers:
        layer.forward = functools.partial(checkpoint, layer.forward, **settings)


def _policy(_: Any, operator: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    if operator in KEPT or operator.name() in KEPT_BY_NAME:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE
