"""Pre-training from a recipe: shards in, metrics, checkpoints and an exported model out.

Report section 3; it does not state optimizer, schedule or batch sizes, so the recipes do. A run
begins from random weights of a given shape, or goes on from a model that is there, such as an
upcycled mixture (report section 2.2.2). The run's folder is described in stage.py.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BeforeValidator, model_validator

from qwen2.common.errors import UserError
from qwen2.common.runtime import keep_freed_memory, set_threads
from qwen2.model.config import PUBLISHED, ModelConfig
from qwen2.tokens.loader import PackedLoader, Packing, TokenSource
from qwen2.tokens.shards import Shards
from qwen2.tokens.share_out import share_out
from qwen2.tokens.weighted import WeightedLoader, by_kind, check_weights
from qwen2.train.first_weights import FirstWeights, RandomWeights, StoredWeights
from qwen2.train.phases import Phase, PhasedLoader, Stretch, cuts, lay_out
from qwen2.train.stage import (
    StageRecipe,
    StageResult,
    claim,
    make_trainee,
    open_data,
    run_stage,
    world_of,
)


def from_published(values: Any) -> Any:
    """A shape as a recipe gives it: `published: 7b` stands for all the fields of that size.

    Raises:
        ValueError: there is no such size.
    """
    if not isinstance(values, dict) or "published" not in values:
        return values
    changes = dict(values)
    name = str(changes.pop("published"))
    if name not in PUBLISHED:
        near = difflib.get_close_matches(name.lower(), PUBLISHED, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no published size {name!r}; {hint}there are {', '.join(PUBLISHED)}")
    return PUBLISHED[name].model_dump() | changes


Shape = Annotated[ModelConfig, BeforeValidator(from_published)]
"""All fields of a model, or `published: SIZE` and those that differ from it."""


class PretrainRecipe(StageRecipe):
    """A pre-training run: `model` from random weights, or `init` further on its own shape."""

    stage: Literal["pretrain"] = "pretrain"
    model: Shape | None = None
    init: str | None = None  # MODEL: a folder, a .gguf file or a hub name
    weights: dict[str, float] | None = None
    """Share of each kind of document in what is trained on; None: as much as there is of it."""
    packing: Packing = "stream"
    """`best_fit`: hardly any document that is shorter than the context is cut; see tokens/."""
    phases: tuple[Phase, ...] = ()
    """Parts of the run with their lengths and what changes; then `steps` and `tokens` are theirs.

    See phases.py.
    """

    @model_validator(mode="after")
    def _one_beginning(self) -> Self:
        if (self.model is None) == (self.init is None):
            raise ValueError("give either model (random weights) or init (existing ones)")
        if self.model and self.plan[0].context > self.model.max_position_embeddings:
            raise ValueError("context exceeds model.max_position_embeddings")
        return self

    @property
    def plan(self) -> list[Stretch]:
        """The phases of the run, or itself as one.

        Raises:
            ValueError: one has no length, or only some have weights.
        """
        if not self.phases:
            return super().plan
        if self.steps is not None or self.tokens is not None:
            raise ValueError("phases: each has its steps or tokens; leave them out of the recipe")
        plan = lay_out(self._first_stretch(), self.phases)
        if plan[0].weights is None and plan[-1].weights is not None:
            raise ValueError("phases: some have weights; give the recipe's weights too, to begin")
        return plan

    def first_weights(self) -> FirstWeights:
        """What the run begins with.

        Raises:
            UserError: `init` is not there, or is of a shorter context.
        """
        if self.init is None:
            assert self.model is not None
            return RandomWeights(self.model, self.seed)
        first, context = StoredWeights(self.init), self.plan[0].context
        if context > first.config.max_position_embeddings:
            raise UserError(
                f"context {context}: {self.init} has max_position_embeddings "
                f"{first.config.max_position_embeddings}; stage long_context extends it"
            )
        return first

    def _first_stretch(self) -> Stretch:
        return replace(super()._first_stretch(), weights=self.weights)


def pretrain(recipe: PretrainRecipe) -> StageResult:
    """Run or resume `recipe`; a finished run is left as it is. See stage.py for its folder.

    Raises:
        UserError: data, tokenizer and model do not fit each other, `out` holds another run, the
            disk is full, or the loss stays non-finite.
    """
    set_threads(recipe.threads)
    keep_freed_memory()
    first = recipe.first_weights()
    shards, tokenizer = open_data(recipe, first.config, recipe.init or "model")
    with world_of(recipe, first.config) as world:
        loader = build_loader(recipe, shards, world.dp_rank, world.mesh.dp)
        claim(recipe)
        torch.manual_seed(recipe.seed)
        trainee = make_trainee(first, recipe, world)
        return run_stage(recipe, trainee, loader, tokenizer)


def build_loader(
    recipe: PretrainRecipe, shards: Shards, rank: int = 0, world_size: int = 1
) -> PhasedLoader:
    """The batches of `recipe` for one rank of those that share its steps.

    Raises:
        UserError: its weights are not of these shards.
    """
    plan = recipe.plan
    groups = [[plan[number] for number in group] for group in cuts(plan)]
    tokens = [sum(s.steps * s.step_tokens for s in group) for group in groups]
    how = recipe.seed, rank, world_size, recipe.packing
    firsts = [group[0] for group in groups]
    shared = [stretch.shared(world_size) for stretch in plan]
    weights = [first.weights for first in firsts if first.weights is not None]
    loaders: list[PackedLoader] = []
    if not weights:
        parts = share_out(shards, tokens, recipe.seed)
        for part, first in zip(parts, firsts, strict=True):
            loaders.append(PackedLoader(part, first.context, first.rows, *how))
        return PhasedLoader(shared, loaders)
    sources = by_kind(shards)
    shares: dict[str, list[TokenSource]] = {}
    for of in weights:
        check_weights(of, sources)
    for kind, source in sources.items():
        wanted = [
            count * of.get(kind, 0.0) / sum(of.values())
            for count, of in zip(tokens, weights, strict=True)
        ]
        shares[kind] = share_out(source, wanted, recipe.seed)
    for number, (of, first) in enumerate(zip(weights, firsts, strict=True)):
        own = {kind: parts[number] for kind, parts in shares.items()}
        loaders.append(WeightedLoader(own, of, first.context, first.rows, *how))
    return PhasedLoader(shared, loaders)
