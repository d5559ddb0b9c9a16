"""The training step and the loop around it, for all stages.

A step is some micro-batches, whose gradients add up to those of the one large batch, then one
update. A batch whose loss or gradient is not finite is passed over: weights, optimizer and schedule
are as if it had not been in the data. The loop knows of a model only that it maps packed tokens to
hidden states; evaluation arrives as a callable.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor

from qwen2.common.errors import UserError
from qwen2.common.progress import Progress, say
from qwen2.common.runtime import peak_memory
from qwen2.common.signals import stop_on_signals
from qwen2.model.decoder import Qwen2
from qwen2.model.moe import Routing
from qwen2.tokens.packing import PackedBatch
from qwen2.train.checkpointer import Checkpointer
from qwen2.train.checkpoints import RunState, load_checkpoint
from qwen2.train.flops import step_flops
from qwen2.train.loss import IGNORE, OutputZ
from qwen2.train.metrics import MetricsFile
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.precision import MasterWeights
from qwen2.train.router import RouterLosses
from qwen2.train.watch import Watchers, WatchSettings, watch

Evaluate = Callable[[Qwen2], dict[str, Any]]
"""Held-out figures of a model, which is in eval mode and without gradients meanwhile."""


SHOWN = ("loss", "grad_norm", "tokens_per_s", "mfu")
"""What the progress bar shows of a metrics line."""


class Loader(Protocol):
    """An endless sequence of packed batches whose place can be saved."""

    def __next__(self) -> PackedBatch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class LoopSettings(WatchSettings):
    """What the loop needs to know; every training recipe has these keys."""

    accumulation: int = Field(default=1, gt=0)  # micro-batches of a step
    clip: float = Field(default=1.0, gt=0)  # largest norm of the whole gradient
    max_skips: int = Field(default=5, gt=0)  # non-finite batches in a row that end the run
    checkpoint_every: int = Field(default=500, gt=0)  # steps
    keep: int = Field(default=2, gt=0)  # newest checkpoints that stay
    keep_every: int | None = Field(default=None, gt=0)  # steps; checkpoints at multiples stay too
    async_checkpoints: bool = False  # write them while training goes on, from a copy in memory
    evaluate_every: int = Field(default=500, gt=0)  # steps
    router_z_loss: float = Field(default=0, ge=0)  # coefficient of a mixture's router z-loss
    output_z_loss: float = Field(default=0, ge=0)  # of the head's; PaLM's is 1e-4


@dataclass(frozen=True)
class StepResult:
    """What one step did; cross-entropy in nats a token, the norm before clipping."""

    loss: float
    grad_norm: float
    applied: bool
    routers: dict[str, Any] = field(default_factory=dict)
    """Metrics of a mixture's routers; empty for a dense model."""
    square_log_z: float | None = None
    """Mean over targets of the squared logsumexp of the logits; None without an output z-loss."""
    tokens: int = 0
    """Targets: what the loss is the mean of. Padding has none."""


@dataclass
class Trainee:
    """What a step changes."""

    model: Qwen2
    weights: MasterWeights
    optimizer: torch.optim.Optimizer


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
    of its routers' losses (router.py); the result's loss is the first alone.
    """
    model, weights, optimizer = trainee.model, trainee.weights, trainee.optimizer
    moe = model.config.moe
    count = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
    routers = moe and RouterLosses(moe, router_z_loss, sum(len(batch.tokens) for batch in batches))
    z = OutputZ(output_z_loss) if output_z_loss else None
    loss = 0.0
    for batch in batches:
        routing = Routing(moe, model.device) if moe else None
        part = batch_loss(model, batch, count, routing, z)
        loss += part.item()
        if routers and routing:
            part = part + routers.add(routing, len(batch.tokens))
        part.backward()
        weights.collect_gradients()
    masters = list(weights.masters.values())
    gradients = [master.grad for master in masters if master.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    grad_norm = norm.item()
    applied = math.isfinite(loss) and math.isfinite(grad_norm)
    if applied:
        if grad_norm > clip:
            torch.nn.utils.clip_grads_with_norm_(masters, clip, norm)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        weights.publish()
    weights.drop_gradients()
    return StepResult(
        z.cross_entropy if z else loss,
        grad_norm,
        applied,
        routers.figures() if routers else {},
        z.square_log_z if z else None,
        count,
    )


def batch_loss(
    model: Qwen2,
    batch: PackedBatch,
    count: int | None = None,
    routing: Routing | None = None,
    z: OutputZ | None = None,
) -> Tensor:
    """Cross-entropy of a packed batch in one process, see `PackedLoss`."""
    return PackedLoss(model)(batch, count, routing, z)


def trained_lengths(batch: PackedBatch) -> list[int]:
    """Tokens of each piece that has a target: padding left out."""
    pieces = zip(batch.lengths, batch.targets.split(batch.lengths), strict=True)
    return [length for length, targets in pieces if bool((targets != IGNORE).any())]


class Run:
    """A run in folder `out`: resumed from its newest checkpoint, or begun.

    `lr` gives the learning rate of a step; `peak_flops` is what MFU is a share of. `enter` makes
    model and loader ready for a step and returns its micro-batches (None: those of `settings`).

    Raises:
        UserError: `out` belongs to another model, or its data changed.
    """

    def __init__(
        self,
        trainee: Trainee,
        loader: Loader,
        settings: LoopSettings,
        lr: Callable[[int], float],
        out: Path,
        stage: str,
        peak_flops: float,
        evaluate: Evaluate | None = None,
        enter: Callable[[int], int] | None = None,
    ) -> None:
        self.trainee, self.loader, self.settings, self.lr = trainee, loader, settings, lr
        self.out, self.stage, self.evaluate = out, stage, evaluate
        self.peak_flops = peak_flops
        self._enter = enter or (lambda _: settings.accumulation)
        self.state = RunState()
        self.checkpoints = Checkpointer(
            out / "checkpoints", settings.keep, settings.keep_every, settings.async_checkpoints
        )
        newest = self.checkpoints.newest()
        if newest is not None:
            self.state, loader_state = load_checkpoint(
                newest, trainee.weights.masters, trainee.optimizer
            )
            trainee.weights.publish()
            loader.load_state_dict(loader_state)
        # A finished run is exported as its last step left it, so the next one is not entered yet.
        self._enter(max(self.state.step - 1, 0))
        self._saved = self.state.step
        self.metrics = MetricsFile(out / "metrics.jsonl", self.state.metrics_bytes)
        self.watchers = Watchers([])

    def train(self, steps: int) -> bool:
        """Train up to `steps` updates in all; False when a signal ended it before.

        Raises:
            UserError: too many non-finite batches in a row, or the disk is full.
        """
        progress = Progress(self.stage, steps, start=self.state.step)
        with (
            stop_on_signals() as stopped,
            progress,
            self._watch(steps) as self.watchers,
            self.checkpoints,
        ):
            while self.state.step < steps and not stopped():
                line = self._step()
                progress.update(self.state.step, **{name: line[name] for name in SHOWN})
                if self.evaluate and self._due(self.settings.evaluate_every, steps):
                    progress.tell(self.state.step, evaluation=self._evaluate(self.evaluate))
                if self._due(self.settings.checkpoint_every, steps):
                    self.save()
            if (name := stopped()) and self.state.step < steps:
                if self.state.step != self._saved:
                    self.save()
                self.checkpoints.wait()
                self.watchers.stop()
                say(f"{name}: stopped at step {self.state.step} of {steps}; run again to go on")
                return False
        return True

    def save(self) -> None:
        """Write a checkpoint of this moment, or begin to."""
        self.state.metrics_bytes = self.metrics.sync()
        self.checkpoints.save(
            self.state,
            self.trainee.weights.masters,
            self.trainee.optimizer,
            self.loader.state_dict(),
            self.settings,
            self.trainee.model.config,
        )
        self._saved = self.state.step

    @property
    def checkpoint(self) -> Path | None:
        """The newest checkpoint."""
        return self.checkpoints.last

    def _step(self) -> dict[str, Any]:
        """One applied step, after passing over batches that are not finite; its metrics line."""
        lr, accumulation = self.lr(self.state.step), self._enter(self.state.step)
        for _ in range(self.settings.max_skips):
            began = time.perf_counter()
            batches = [next(self.loader) for _ in range(accumulation)]
            result = train_step(
                self.trainee,
                batches,
                lr,
                self.settings.clip,
                self.settings.router_z_loss,
                self.settings.output_z_loss,
            )
            seconds = time.perf_counter() - began
            if result.applied:
                break
            self._pass_over(result)
        else:
            raise UserError(
                f"{self.out}: {self.settings.max_skips} batches in a row without a finite loss and "
                f"gradient after step {self.state.step}; lower optimizer.lr or look at the data"
            )
        lengths = [length for batch in batches for length in trained_lengths(batch)]
        self.state.step += 1
        self.state.tokens += result.tokens
        flops = step_flops(self.trainee.model.config, lengths)
        line = {
            "step": self.state.step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": round(result.tokens / seconds, 1),
            "mfu": round(flops / seconds / self.peak_flops, 4),
            "memory_gb": round(peak_memory(self.trainee.model.device) / 1e9, 3),
            "tokens": self.state.tokens,
            **result.routers,
        }
        if result.square_log_z is not None:
            line["output_z_loss"] = result.square_log_z
        self.watchers.write(line)
        return line

    def _pass_over(self, result: StepResult) -> None:
        self.state.skipped += 1
        what = f"loss {result.loss}, gradient norm {result.grad_norm}"
        say(f"batch after step {self.state.step} passed over: {what}")
        self.watchers.write({"step": self.state.step, "skipped": what})

    def _due(self, every: int, steps: int) -> bool:
        return self.state.step % every == 0 or self.state.step == steps

    def _evaluate(self, evaluate: Evaluate) -> dict[str, Any]:
        model = self.trainee.model
        model.eval()
        with torch.no_grad():
            figures = evaluate(model)
        model.train()
        self.watchers.write({"step": self.state.step, "evaluation": figures})
        return figures

    def _watch(self, steps: int) -> Watchers:
        """All that look on from here to step `steps`."""
        device = self.trainee.model.device
        return watch(
            self.settings, self.metrics, self.out, self.stage, self.state.step, steps, device
        )
