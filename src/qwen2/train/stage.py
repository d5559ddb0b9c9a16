"""What all stages of pre-training share: the keys of their recipes, and the run in its folder.

    recipe.yaml      the recipe, resolved
    metrics.jsonl    a line a step; evaluations
    run.html         the same to look at, while it runs and after
    checkpoints/     the newest training checkpoints
    model/           the finished model in the Hugging Face layout

A stage brings its first weights and its documents. Once there is a checkpoint it decides: weights,
optimizer, place in the data and random numbers are its own, whatever the run began from.

Started by torchrun, each rank runs this; the first one alone writes what is not a checkpoint.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
import yaml
from pydantic import Field, model_validator

from qwen2.common.errors import UserError
from qwen2.common.files import read_text, remove_leftovers
from qwen2.common.runtime import fp32_products, parse_dtype
from qwen2.model.config import ModelConfig
from qwen2.model.extend import reconfigure
from qwen2.model.weights import on_meta
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.shards import Shards
from qwen2.train.compiling import compiled
from qwen2.train.export import export
from qwen2.train.first_weights import FirstWeights
from qwen2.train.flops import measure_matmul_peak
from qwen2.train.held_out import HeldOut
from qwen2.train.loop import METRICS, LoopSettings, Run
from qwen2.train.mesh import Mesh
from qwen2.train.optimizers import OptimizerConfig
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.parallelise import parallelise
from qwen2.train.phases import PhasedLoader, Stretch, config_of_phase, factor_at, phase_at
from qwen2.train.precision import MasterWeights
from qwen2.train.ranks import from_first
from qwen2.train.recompute import Recompute, recompute_activations
from qwen2.train.schedules import Cosine, Schedule
from qwen2.train.step import Trainee
from qwen2.train.tensorboard import require_tensorboard
from qwen2.train.world import World, open_world

FREE = {
    "out", "threads", "device", "activation_checkpointing", "keep", "keep_every",
    "checkpoint_every", "async_checkpoints", "evaluate_every", "held_out", "held_out_tokens",
    "tensorboard", "profile", "mesh", "compile",
}  # fmt: skip
"""Keys that may change when a run resumes: none of them changes what is computed, but for the order
of sums."""


class StageRecipe(LoopSettings):
    """The keys that every stage's recipe has."""

    stage: str
    data: Path  # a folder of shards
    tokenizer: Path  # the tokenizer that made them; goes into the exported model
    out: Path
    context: int = Field(gt=1)  # tokens of a row
    rows: int = Field(gt=0)  # of a micro-batch, at most; a step's are shared by the ranks
    steps: int | None = Field(default=None, gt=0)
    tokens: int | None = Field(default=None, gt=0)  # instead of steps
    optimizer: OptimizerConfig
    schedule: Schedule = Cosine()
    dtype: Literal["bf16", "fp32"] = "bf16"
    matmul: Literal["fp32", "rounded"] = "fp32"  # of fp32: to bf16 on the CPU, to TF32 on CUDA
    activation_checkpointing: Recompute = "none"
    compile: bool = False  # what lies between products, see compiling.py
    held_out: Path | None = None
    """A folder of shards, whose bits per byte by kind are measured every `evaluate_every` steps."""
    held_out_tokens: int = Field(default=100_000, gt=0)  # of each kind that are read for that
    mesh: Mesh = Mesh()  # how ranks share the work, see mesh.py
    device: str = "auto"
    threads: int | None = Field(default=None, gt=0)
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _has_a_length(self) -> Self:
        assert self.plan
        return self

    @model_validator(mode="after")
    def _rounds_what_is_exact(self) -> Self:
        if self.matmul == "rounded" and self.dtype != "fp32":
            raise ValueError("matmul rounded: products in bf16 are so already; give dtype fp32")
        return self

    @property
    def plan(self) -> list[Stretch]:
        """The phases of the run: one.

        Raises:
            ValueError: it has no length.
        """
        return [self._first_stretch().lasting(self.steps, self.tokens)]

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return sum(stretch.steps for stretch in self.plan)

    @property
    def total_tokens(self) -> int:
        """Tokens of the whole run, padding too; a budget is rounded up to steps."""
        return sum(stretch.steps * stretch.step_tokens for stretch in self.plan)

    @abstractmethod
    def first_weights(self) -> FirstWeights:
        """What the run begins with; each stage has its own."""

    def lr(self, step: int) -> float:
        """Learning rate of an update, counted from 0."""
        return self.optimizer.lr * factor_at(self.plan, self.schedule, step)

    def _first_stretch(self) -> Stretch:
        """What the keys of the recipe say of its beginning, without a length."""
        return Stretch(0, 0, self.context, self.rows, self.accumulation)


@dataclass(frozen=True)
class StageResult:
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


def open_data(recipe: StageRecipe, config: ModelConfig, model: str) -> tuple[Shards, Tokenizer]:
    """The shards and the tokenizer of `recipe`, which fit the model of `config`.

    Raises:
        UserError: they are not there, or have more ids than embeddings; `model` names the model.
    """
    shards, tokenizer = Shards(recipe.data), Tokenizer.load(recipe.tokenizer)
    for what, ids in (
        (f"the shards in {recipe.data} have", shards.index.vocab_size),
        (f"the tokenizer in {recipe.tokenizer} has", tokenizer.vocab_size),
    ):
        if ids > config.vocab_size:
            raise UserError(
                f"{model}.vocab_size {config.vocab_size}: {what} {ids} ids; "
                "give at least that many rows"
            )
    return shards, tokenizer


def run_stage(
    recipe: StageRecipe,
    trainee: Trainee,
    loader: PhasedLoader,
    tokenizer: Tokenizer,
) -> StageResult:
    """Run or resume `recipe`, whose `out` is claimed; export the model when it is finished.

    `loader` is of the recipe's plan, for this rank.
    """
    world, plan, config = trainee.world, loader.plan, trainee.model.config

    def enter(step: int) -> int:
        number = phase_at(plan, step)
        loader.enter(number)
        reconfigure(trainee.model, config_of_phase(config, plan, number))
        return plan[number].accumulation

    first, held_out = loader.plan[0], None
    if recipe.held_out is not None:
        shards = Shards(recipe.held_out)
        tokens = recipe.held_out_tokens
        held_out = HeldOut(shards, tokenizer, first.context, first.rows, tokens)
    rounded = recipe.matmul == "rounded"
    with fp32_products(rounded, world.device), compiled(recipe.compile, world.device):
        run = Run(
            trainee,
            loader,
            recipe,
            recipe.lr,
            recipe.out,
            recipe.stage,
            measure_matmul_peak(parse_dtype(recipe.dtype), world.device),
            None if held_out is None else held_out.bits_per_byte,
            enter,
        )
        finished = run.train(recipe.total_steps)
    exported = recipe.out / "model"

    def export_once() -> None:
        if not exported.exists():
            assert run.checkpoint is not None  # of the last step
            export(run.checkpoint, exported, tokenizer, parse_dtype(recipe.dtype))

    if finished:
        from_first(export_once, run.checkpoints.group)
    return StageResult(
        run.state.step,
        recipe.total_steps,
        run.state.tokens,
        run.state.skipped,
        finished,
        recipe.out / METRICS,
        run.checkpoint,
        exported if finished else None,
    )


def make_trainee(first: FirstWeights, recipe: StageRecipe, world: World) -> Trainee:
    """The model of `recipe` with its first weights, divided among ranks, and its optimizer.

    Raises:
        UserError: the weights are quantised.
    """
    config, dtype = first.config, parse_dtype(recipe.dtype)
    if config.quantisation:
        raise UserError("init: its weights are quantised, for inference alone; give the original")
    if world.views:
        loss = divided(config, recipe, world)
        loss.to_empty(device=world.device)
        loss.model.tie_weights()
        first.fill(dict(loss.model.named_parameters()))
        weights = MasterWeights(loss.model, torch.float32)
    else:
        model = first.model(world.device)
        weights = MasterWeights(model, dtype)
        recompute_activations(model, recipe.activation_checkpointing)
        loss = PackedLoss(model)
    return Trainee(loss, weights, recipe.optimizer.build(weights.masters))


def divided(config: ModelConfig, recipe: StageRecipe, world: World) -> PackedLoss:
    """The model of `recipe` divided among the ranks of `world`, on the meta device."""
    model = on_meta(config)
    recompute_activations(model, recipe.activation_checkpointing)
    return parallelise(model, world, parse_dtype(recipe.dtype))


@contextmanager
def world_of(recipe: StageRecipe, config: ModelConfig) -> Iterator[World]:
    """The ranks of a run of `recipe` on a model of `config`.

    Raises:
        UserError: the mesh does not fit the ranks, the model or a phase; says why.
    """
    plan = recipe.plan
    with open_world(recipe.mesh, config, plan[0].context, recipe.device) as world:
        for stretch in plan:
            recipe.mesh.resolve(world.mesh.world_size, config, stretch.context)
            stretch.shared(world.mesh.dp, world.mesh.pp)
        yield world


def claim(recipe: StageRecipe) -> None:
    """Write recipe.yaml into `out`, or check that the one there is of the same run.

    Raises:
        UserError: `out` holds another run; says which key differs. Or the recipe asks for
            TensorBoard, which is not installed.
    """
    from_first(lambda: _claim(recipe))


def _claim(recipe: StageRecipe) -> None:
    if recipe.tensorboard:
        require_tensorboard()
    path = recipe.out / "recipe.yaml"
    remove_leftovers(recipe.out)
    if path.exists():
        _check_stage(path, recipe)
        before = type(recipe).load(path)
        old, new = (json.loads(r.model_dump_json(exclude=FREE)) for r in (before, recipe))
        for key in new:
            if old[key] != new[key]:
                raise UserError(
                    f"{recipe.out}: holds a run with another {key} ({old[key]}, now {new[key]}); "
                    "choose another out"
                )
    recipe.save(path)


def _check_stage(path: Path, recipe: StageRecipe) -> None:
    """A recipe of another kind has other keys: say that, not which of them is unknown."""
    values = yaml.safe_load(read_text(path))
    before = values.get("stage") if isinstance(values, dict) else None
    if before != recipe.stage:
        raise UserError(
            f"{recipe.out}: holds a run of stage {before}, not {recipe.stage}; choose another out"
        )
