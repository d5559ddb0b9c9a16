"""The quickstart's training: pre-training, the long-context stage, upcycling and what follows it.

    pretrain        random weights, short rows, base 10,000
    long_context    the same model on rows of eight times the length, base 1,000,000
    mixture         the pre-trained model upcycled to experts, and trained further

Each has a share of the time that is left. Its number of steps is fixed at its first start, so that
a resumed run has the same schedule.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch

from qwen2.common.errors import UserError
from qwen2.common.runtime import pick_device, training_dtype
from qwen2.evaluate.positions import nats_by_method
from qwen2.model.hub import load_model
from qwen2.model.upcycle import upcycle
from qwen2.pipeline.long_context import LongDocuments, read_positions, run_long_context
from qwen2.pipeline.quickstart.data import HELD_OUT_SHARDS, TRAIN_SHARDS
from qwen2.pipeline.quickstart.recipe import QuickRun
from qwen2.pipeline.report import read_metrics, training_lines
from qwen2.pipeline.stages import Stopped
from qwen2.tokenizer import Tokenizer
from qwen2.tokens import Shards
from qwen2.tokens.loader import PackedLoader
from qwen2.train.held_out import HeldOut
from qwen2.train.long_context import LongContextRecipe
from qwen2.train.optimizers import AdamWConfig
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.pretrain import PretrainRecipe, pretrain
from qwen2.train.schedules import Cosine
from qwen2.train.stage import StageRecipe, StageResult, make_trainee
from qwen2.train.step import train_step
from qwen2.train.world import World

R = TypeVar("R", bound=StageRecipe)

MEASURED_DOCUMENTS = 8  # long held-out ones, to measure loss by position on


def pretraining(run: QuickRun) -> dict[str, Any]:
    """Pre-train from random weights."""
    quick, out = run.recipe, run.folder.resolve() / "pretrain"

    def recipe(steps: int) -> PretrainRecipe:
        return PretrainRecipe(
            model=quick.model,
            context=quick.context,
            rows=quick.rows,
            **_common(run, out, steps, quick.lr),
        )

    chosen = _begun(out, PretrainRecipe) or _fill_time(run, "pretrain", recipe)
    result = _finished(pretrain(chosen))
    return _figures(run, result) | {
        "parameters": quick.model.num_parameters(),
        "step_tokens": chosen.plan[0].step_tokens,
    }


def long_context(run: QuickRun) -> dict[str, Any]:
    """More context and the larger base; and how far other ways carry the model from before."""
    quick, out = run.recipe, run.folder.resolve() / "long_context"
    init = run.folder.resolve() / run.results["pretrain"]["model"]
    held = run.folder.resolve() / HELD_OUT_SHARDS

    def recipe(steps: int) -> LongContextRecipe:
        return LongContextRecipe(
            stage="long_context",
            init=str(init),
            context=quick.long_context,
            rows=max(1, quick.rows * quick.context // quick.long_context),
            long_tokens=quick.long_context,
            held_out_documents=MEASURED_DOCUMENTS,
            **_common(run, out, steps, quick.further_lr),
        )

    chosen = _begun(out, LongContextRecipe) or _fill_time(run, "long_context", recipe)
    result = _finished(run_long_context(chosen))
    documents = LongDocuments(Shards(held), quick.long_context, MEASURED_DOCUMENTS)
    methods = nats_by_method(
        load_model(init).eval(), list(documents.read("extensions")), quick.long_context
    )
    return _figures(run, result) | {
        "trained_length": quick.context,
        "length": quick.long_context,
        "positions": {
            moment: asdict(by) for moment, by in read_positions(out / "positions.json").items()
        },
        "methods": {method: asdict(by) for method, by in methods.items()},
    }


def mixture(run: QuickRun) -> dict[str, Any]:
    """Upcycle the pre-trained model to a mixture of experts, and train that further."""
    quick, out = run.recipe, run.folder.resolve() / "mixture" / "train"
    dense = run.folder / run.results["pretrain"]["model"]
    start = out.with_name("start")
    if not start.exists():
        upcycle(dense, start, quick.upcycle)

    def recipe(steps: int) -> PretrainRecipe:
        return PretrainRecipe(
            init=str(start),
            context=quick.context,
            rows=quick.rows,
            **_common(run, out, steps, quick.further_lr),
        )

    chosen = _begun(out, PretrainRecipe) or _fill_time(run, "mixture", recipe)
    result = _finished(pretrain(chosen))
    assert result.model is not None
    upcycled = load_model(start)
    shards, coder = Shards(run.folder / HELD_OUT_SHARDS), Tokenizer.load(run.folder / "tokenizer")
    held_out = HeldOut(shards, coder, quick.context, quick.rows, quick.watched_tokens)
    last = training_lines(read_metrics(result.metrics))[-1]
    return _figures(run, result) | {
        "parameters": upcycled.config.num_parameters(),
        "active_parameters": upcycled.config.num_active_parameters(),
        "bits_per_byte": {
            "dense": held_out.bits_per_byte(PackedLoss(load_model(dense))),
            "upcycled": held_out.bits_per_byte(PackedLoss(upcycled)),
            "trained further": held_out.bits_per_byte(PackedLoss(load_model(result.model))),
        },
        **{key: last[key] for key in ("expert_share", "expert_entropy", "dropped")},
    }


def _common(run: QuickRun, out: Path, steps: int, lr: float) -> dict[str, Any]:
    """The keys that all three stages fill alike; paths absolute, to be run from anywhere."""
    folder, dtype = run.folder.resolve(), run.recipe.dtype
    return {
        "data": folder / TRAIN_SHARDS,
        "tokenizer": folder / "tokenizer",
        "out": out,
        "steps": steps,
        "optimizer": AdamWConfig(lr=lr),
        "schedule": Cosine(warmup=max(1, min(100, steps // 10)), floor=0.05),
        "dtype": training_dtype(pick_device()) if dtype == "auto" else dtype,
        "seed": run.recipe.seed,
        "checkpoint_every": max(1, steps // 5),
        "keep": 1,
        "evaluate_every": max(1, steps // 8),
        "held_out": folder / HELD_OUT_SHARDS,
        "held_out_tokens": run.recipe.watched_tokens,
    }


def _begun(out: Path, kind: type[R]) -> R | None:
    """The recipe of a run that was stopped."""
    path = out / "recipe.yaml"
    return kind.load(path) if path.exists() else None


def _fill_time(run: QuickRun, name: str, recipe: Callable[[int], R]) -> R:
    """The recipe whose steps fill the time of stage `name`, by the speed of a few of them.

    When the stages before it took longer than was thought, one step is the least.
    """
    quick = run.recipe
    left = 60 * quick.minutes - run.seconds - quick.reserve_seconds
    if left <= 0 and name == "pretrain":
        raise UserError(
            f"minutes {quick.minutes:g}: {run.seconds:.0f} s are gone before training and "
            f"{quick.reserve_seconds:.0f} s are kept for the stages after it; give more minutes"
        )
    shares: Mapping[str, float] = quick.shares.model_dump()
    share = shares[name] / sum(x for stage, x in shares.items() if stage not in run.results)
    seconds = _seconds_per_step(recipe(1))
    steps = max(1, int(0.9 * share * left / seconds))  # the machine may slow down meanwhile
    return recipe(min(steps, quick.max_steps or steps))


def _seconds_per_step(recipe: StageRecipe, timed: int = 5) -> float:
    """Median time of some steps after a first one, on weights that are thrown away."""
    loader = PackedLoader(Shards(recipe.data), recipe.context, recipe.rows, recipe.seed)
    alone = World.alone(torch.device("cpu"))
    learner, times = make_trainee(recipe.first_weights(), recipe, alone), []
    for _ in range(1 + timed):
        started = time.perf_counter()
        train_step(learner, [next(loader)], 0.0, 1.0)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def _finished(result: StageResult) -> StageResult:
    if not result.finished:
        raise Stopped("training is saved; run the same command again to go on")
    return result


def _figures(run: QuickRun, result: StageResult) -> dict[str, Any]:
    assert result.model is not None
    folder = run.folder.resolve()
    return {
        "steps": result.steps,
        "tokens": result.tokens,
        "skipped": result.skipped,
        "metrics": str(result.metrics.relative_to(folder)),
        "model": str(result.model.relative_to(folder)),
    }
