"""The training step of all stages: some micro-batches, whose gradients add up to those of the one
large batch, then one update.

A step whose loss or gradient is not finite changes nothing: weights, optimizer and schedule are as
if its data had not been there. Over many ranks each has its own rows, and all see the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from qwen2.model.decoder import Qwen2
from qwen2.tokens.packing import PackedBatch
from qwen2.train.flops import step_flops
from qwen2.train.gradients import scale_gradients, total_norm
from qwen2.train.loss import IGNORE, OutputZ
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.precision import MasterWeights
from qwen2.train.router import RouterLosses
from qwen2.train.world import World


@dataclass(frozen=True)
class StepResult:
    """What one step did over all ranks; cross-entropy in nats a token, the norm before clipping."""

    loss: float
    grad_norm: float
    applied: bool
    routers: dict[str, Any] = field(default_factory=dict)
    """Metrics of a mixture's routers; empty for a dense model."""
    square_log_z: float | None = None
    """Mean over targets of the squared logsumexp of the logits; None without an output z-loss."""
    tokens: int = 0
    """Targets: what the loss is the mean of. Padding has none."""
    flops: float = 0.0
    """Of the model, forward and backward; padding has none, nor what is computed again."""


@dataclass
class Trainee:
    """What a step changes."""

    loss: PackedLoss
    weights: MasterWeights
    optimizer: torch.optim.Optimizer

    @property
    def model(self) -> Qwen2:
        """The model, or this rank's parts of it."""
        return self.loss.model

    @property
    def world(self) -> World:
        """The ranks that it is divided among."""
        return self.loss.world


def train_step(
    trainee: Trainee,
    batches: Sequence[PackedBatch],
    lr: float,
    clip: float,
    router_z_loss: float = 0.0,
    output_z_loss: float = 0.0,
) -> StepResult:
    """One update from `batches` at learning rate `lr`, or none when it would not be finite.

    The gradient is that of the cross-entropy, of the output's z-loss (loss.py) and, for a mixture,
    of its routers' losses (router.py); the result's loss is the first alone. `batches` are this
    rank's; each has as many, of the same size.
    """
    world, weights, optimizer = trainee.world, trainee.weights, trainee.optimizer
    config = trainee.model.config
    own = [length for batch in batches for length in trained_lengths(batch)]
    targets = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
    read = torch.tensor([targets, step_flops(config, own)], dtype=torch.float64)
    count, flops = world.sum(read, "dp").tolist()
    moe = config.moe
    tokens = sum(len(batch.tokens) for batch in batches)
    routers = RouterLosses(moe, router_z_loss, tokens) if moe else None
    z = OutputZ(output_z_loss) if output_z_loss else None
    part = trainee.loss.backward(batches, int(count), routers, z, weights.collect_gradients)
    parts = [float(part), *((z.cross_entropy, z.square_log_z) if z else ())]
    loss, *of_z = world.sum(torch.tensor(parts, dtype=torch.float64), "data").tolist()
    masters = list(weights.masters.values())
    norm = total_norm([master.grad for master in masters if master.grad is not None])
    grad_norm = norm.item()
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    if applied:
        if grad_norm > clip:
            scale_gradients(masters, clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        weights.publish()
    weights.drop_gradients()
    return StepResult(
        of_z[0] if of_z else loss,
        grad_norm,
        applied,
        routers.figures(world) if routers else {},
        of_z[1] if of_z else None,
        int(count),
        flops,
    )


def trained_lengths(batch: PackedBatch) -> list[int]:
    """Tokens of each piece that has a target: padding left out."""
    pieces = zip(batch.lengths, batch.targets.split(batch.lengths), strict=True)
    return [length for length, targets in pieces if bool((targets != IGNORE).any())]
