"""Pre-training from a recipe: shards in, metrics, checkpoints and an exported model out.

Report section 3; it does not state optimizer, schedule or batch sizes, so the recipes do. The run
lies in one folder:

    recipe.yaml      the recipe, resolved
    metrics.jsonl    a line a step; evaluations
    checkpoints/     the newest training checkpoints
    model/           the finished model in the Hugging Face layout
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field, model_validator

from qwen2.common.errors import UserError
from qwen2.common.files import remove_leftovers
from qwen2.common.runtime import keep_freed_memory, parse_dtype, pick_device, set_threads
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hub import save
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.loader import PackedLoader
from qwen2.tokens.shards import Shards
from qwen2.train.flops import measure_matmul_peak
from qwen2.train.loop import Evaluate, LoopSettings, Run, Trainee
from qwen2.train.optimizers import AdamWConfig
from qwen2.train.precision import MasterWeights
from qwen2.train.schedules import Cosine, Schedule

FREE = {"out", "threads", "device", "keep", "checkpoint_every", "evaluate_every"}
"""Keys that may change when a run resumes: none of them changes what is computed."""


class PretrainRecipe(LoopSettings):
    """A pre-training run."""

    stage: Literal["pretrain"] = "pretrain"
    model: ModelConfig
    data: Path  # a folder of shards
    tokenizer: Path  # the tokenizer that made them; goes into the exported model
    out: Path
    context: int = Field(gt=1)  # tokens of a row
    rows: int = Field(gt=0)  # of a micro-batch
    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)  # instead of steps
    optimizer: AdamWConfig
    schedule: Schedule = Cosine()
    dtype: Literal["bf16", "fp32"] = "bf16"
    device: str = "auto"
    threads: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_length(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either steps or tokens")
        if self.context > self.model.max_position_embeddings:
            raise ValueError("context exceeds model.max_position_embeddings")
        return self

    @property
    def step_tokens(self) -> int:
        """Tokens of one update."""
        return self.context * self.rows * self.accumulation

    @property
    def total_steps(self) -> int:
        """Updates of the whole run; a token budget is rounded up."""
        return self.steps or -(-(self.tokens or 0) // self.step_tokens)


@dataclass(frozen=True)
class PretrainResult:
    """Where a run stands and where its things lie."""

    step: int
    steps: int
    tokens: int
    skipped: int
    finished: bool
    metrics: Path
    checkpoint: Path | None
    model: Path | None
    """The exported model; None until the run is finished."""


def pretrain(recipe: PretrainRecipe, evaluate: Evaluate | None = None) -> PretrainResult:
    """Run or resume `recipe`; a finished run is left as it is. See the module for its folder.

    Raises:
        UserError: data, tokenizer and model do not fit each other, `out` holds another run, the
            disk is full, or the loss stays non-finite.
    """
    set_threads(recipe.threads)
    keep_freed_memory()
    device = pick_device(recipe.device)
    shards = Shards(recipe.data)
    tokenizer = Tokenizer.load(recipe.tokenizer)
    if shards.index.vocab_size > recipe.model.vocab_size:
        raise UserError(
            f"model.vocab_size {recipe.model.vocab_size}: the shards in {recipe.data} have "
            f"{shards.index.vocab_size} ids; give at least that many rows"
        )
    _claim(recipe)
    torch.manual_seed(recipe.seed)
    loader = PackedLoader(shards, recipe.context, recipe.rows, recipe.seed)
    trainee = build_trainee(recipe, device)
    run = Run(
        trainee,
        loader,
        recipe,
        lambda step: recipe.optimizer.lr * recipe.schedule.factor(step, recipe.total_steps),
        recipe.out,
        recipe.stage,
        measure_matmul_peak(trainee.model.dtype, device),
        evaluate,
    )
    finished = run.train(recipe.total_steps)
    exported = recipe.out / "model"
    if finished and not exported.exists():
        save(trainee.model, tokenizer, exported)
    return PretrainResult(
        run.state.step,
        recipe.total_steps,
        run.state.tokens,
        run.state.skipped,
        finished,
        run.metrics.path,
        run.checkpoint,
        exported if finished else None,
    )


def build_trainee(recipe: PretrainRecipe, device: torch.device) -> Trainee:
    """The model of `recipe` with its first weights, and its optimizer."""
    model = Qwen2(recipe.model)
    init_weights(model, torch.Generator().manual_seed(recipe.seed))
    weights = MasterWeights(model.to(device), parse_dtype(recipe.dtype))
    return Trainee(model, weights, recipe.optimizer.build(weights.masters))


def _claim(recipe: PretrainRecipe) -> None:
    """Write recipe.yaml into `out`, or check that the one there is of the same run."""
    path = recipe.out / "recipe.yaml"
    remove_leftovers(recipe.out)
    if path.exists():
        before = PretrainRecipe.load(path)
        old, new = (json.loads(r.model_dump_json(exclude=FREE)) for r in (before, recipe))
        for key in new:
            if old[key] != new[key]:
                raise UserError(
                    f"{recipe.out}: holds a run with another {key} ({old[key]}, now {new[key]}); "
                    "choose another out"
                )
    recipe.save(path)
