"""The loop around the training step, for all stages and any number of ranks.

It passes over batches whose loss or gradient is not finite, saves, evaluates, stops when it is
asked to, and goes on from the newest checkpoint. It knows of a model only that it has a loss;
evaluation arrives as a callable. Every rank runs it alike; the first one writes and speaks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field

from qwen2.common.errors import UserError
from qwen2.common.progress import Progress, say
from qwen2.common.runtime import peak_memory
from qwen2.common.signals import stop_on_signals
from qwen2.tokens.packing import PackedBatch
from qwen2.train.checkpointer import Checkpointer
from qwen2.train.checkpoints import RunState, load_checkpoint
from qwen2.train.metrics import MetricsFile
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.spikes import SpikeSettings
from qwen2.train.step import StepResult, Trainee, train_step
from qwen2.train.watch import Watchers, WatchSettings, watch

Evaluate = Callable[[PackedLoss], dict[str, Any]]
"""Held-out figures of a model with its loss, which is in eval mode and without gradients meanwhile.
All ranks call it, and all have the figures."""

METRICS = "metrics.jsonl"

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
    spike: SpikeSettings | None = None  # go back from a loss that is far too high, see spikes.py
    keep: int = Field(default=2, gt=0)  # newest checkpoints that stay
    keep_every: int | None = Field(default=None, gt=0)  # steps; checkpoints at multiples stay too
    async_checkpoints: bool = False  # write them while training goes on, from a copy in memory
    evaluate_every: int = Field(default=500, gt=0)  # steps
    router_z_loss: float = Field(default=0, ge=0)  # coefficient of a mixture's router z-loss
    output_z_loss: float = Field(default=0, ge=0)  # of the head's; PaLM's is 1e-4


class Run:
    """A run in folder `out`: resumed from its newest checkpoint, or begun.

    `lr` gives the learning rate of a step; MFU is a share of `peak_flops`, a rank's. `enter` makes
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
        self.world = trainee.world
        self.out, self.stage, self.evaluate = out, stage, evaluate
        self.peak_flops = peak_flops * self.world.mesh.world_size
        self._enter = enter or (lambda _: settings.accumulation)
        self.state = RunState()
        self.checkpoints = Checkpointer(
            out / "checkpoints", settings.keep, settings.keep_every, settings.async_checkpoints
        )
        newest = self.checkpoints.newest()
        if newest is not None:
            self._load(newest)
        # A finished run is exported as its last step left it, so the next one is not entered yet.
        self._enter(max(self.state.step - 1, 0))
        self._saved = self.state.step
        self._read, self._returns = 0, 0  # micro-batches and rollbacks since the newest checkpoint
        self.metrics: MetricsFile | None = None
        if self.world.is_first:
            self.metrics = MetricsFile(out / METRICS, self.state.metrics_bytes)
        self.watchers = Watchers([])

    def train(self, steps: int) -> bool:
        """Train up to `steps` updates in all; False when a signal ended it before.

        Raises:
            UserError: too many non-finite batches in a row, or the disk is full.
        """
        progress = Progress(self.stage, steps, start=self.state.step, quiet=not self.world.is_first)
        with (
            stop_on_signals(once=not self.world.views) as stopped,
            progress,
            self._watch(steps) as self.watchers,
            self.checkpoints,
        ):
            stop = self.world.any(bool(stopped()))
            while self.state.step < steps and not stop:
                line = self._step()
                if self._went_back(line["loss"]):
                    continue
                progress.update(self.state.step, **{name: line[name] for name in SHOWN})
                if self.evaluate and self._due(self.settings.evaluate_every, steps):
                    progress.tell(self.state.step, evaluation=self._evaluate(self.evaluate))
                if self._due(self.settings.checkpoint_every, steps):
                    self.save()
                stop = self.world.any(bool(stopped()))
            if stop and self.state.step < steps:
                if self.state.step != self._saved:
                    self.save()
                self.checkpoints.wait()
                self.watchers.stop()
                where = f"stopped at step {self.state.step} of {steps}; run again to go on"
                self._say(f"{stopped() or 'asked on another rank'}: {where}")
                return False
        return True

    def save(self) -> None:
        """Write a checkpoint of this moment, or begin to."""
        self.state.metrics_bytes = self.metrics.sync() if self.metrics else 0
        self.checkpoints.save(
            self.state,
            self.trainee.weights.masters,
            self.trainee.optimizer,
            self.loader.state_dict(),
            self.settings,
            self.trainee.model.config,
        )
        self._saved = self.state.step
        self._read = self._returns = 0

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
            self._read += accumulation
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
        self.state.step += 1
        self.state.tokens += result.tokens
        line = {
            "step": self.state.step,
            "loss": result.loss,
            "lr": lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": round(result.tokens / seconds, 1),
            "mfu": round(result.flops / seconds / self.peak_flops, 4),
            "memory_gb": round(peak_memory(self.trainee.model.device) / 1e9, 3),
            "tokens": self.state.tokens,
            **result.routers,
        }
        if result.square_log_z is not None:
            line["output_z_loss"] = result.square_log_z
        self.watchers.write(line)
        return line

    def _went_back(self, loss: float) -> bool:
        """Whether `loss`, of the last step, made the run go back; see spikes.py.

        Raises:
            UserError: it has gone back to the same checkpoint too often.
        """
        spike, before = self.settings.spike, self.state.losses
        if spike is None:
            return False
        if why := spike.describe(loss, before):
            self.checkpoints.wait()  # until then ranks may not know of the same newest one
        if why is None or self.checkpoint is None:
            self.state.losses = [*before, loss][-spike.window :]
            return False
        why = f"{why}, at step {self.state.step}"
        if self._returns == spike.most:
            raise UserError(
                f"{self.out}: {why}, after {spike.most} returns to {self.checkpoint.name}; lower "
                "optimizer.lr, or look at the data"
            )
        self._returns += 1
        self._load(self.checkpoint)
        for _ in range(self._read + spike.skip):
            next(self.loader)
        self._read += spike.skip
        self._say(f"{why}: back to step {self.state.step}, {self._read} micro-batches left out")
        said = {"step": self.state.step, "tokens": self.state.tokens, "rolled_back": why}
        self.watchers.write(said)
        return True

    def _load(self, checkpoint: Path) -> None:
        trainee = self.trainee
        self.state, place = load_checkpoint(checkpoint, trainee.weights.masters, trainee.optimizer)
        trainee.weights.publish()
        self.loader.load_state_dict(place)

    def _pass_over(self, result: StepResult) -> None:
        self.state.skipped += 1
        what = f"loss {result.loss}, gradient norm {result.grad_norm}"
        self._say(f"batch after step {self.state.step} passed over: {what}")
        self.watchers.write({"step": self.state.step, "skipped": what})

    def _due(self, every: int, steps: int) -> bool:
        return self.state.step % every == 0 or self.state.step == steps

    def _evaluate(self, evaluate: Evaluate) -> dict[str, Any]:
        loss = self.trainee.loss
        loss.eval()
        with torch.no_grad():
            figures = evaluate(loss)
        loss.train()
        self.watchers.write({"step": self.state.step, "evaluation": figures})
        return figures

    def _watch(self, steps: int) -> Watchers:
        """All that look on from here to step `steps`: at the first rank, whose view is of all."""
        if self.metrics is None:
            return Watchers([])
        device = self.world.device
        return watch(
            self.settings, self.metrics, self.out, self.stage, self.state.step, steps, device
        )

    def _say(self, message: str) -> None:
        if self.world.is_first:
            say(message)
