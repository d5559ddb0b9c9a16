"""The long-context stage: the last phase of pre-training, on rows many times longer.

Report section 3.2: the context grows from 4,096 to 32,768 tokens with much more long data, and the
base of the rotations from 10,000 to 1,000,000. It is pre-training otherwise: the same loss and the
same run in its folder (stage.py), on the weights of `init` and with a fresh optimizer. YARN or dual
chunks of `init` are left out, for they stand in for what is learnt here; they can be switched on
again afterwards, on top of the new length.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from pydantic import Field

from qwen2.common.errors import UserError
from qwen2.common.progress import say
from qwen2.common.runtime import keep_freed_memory, set_threads
from qwen2.model.config import ModelConfig
from qwen2.model.hub import load_config
from qwen2.tokens.loader import PackedLoader, Packing, TokenSource
from qwen2.tokens.mixture import LongMixture
from qwen2.train.first_weights import FirstWeights, StoredWeights
from qwen2.train.phases import PhasedLoader
from qwen2.train.ranks import from_first
from qwen2.train.stage import (
    StageRecipe,
    StageResult,
    claim,
    make_trainee,
    open_data,
    run_stage,
    world_of,
)


class LongContextRecipe(StageRecipe):
    """A long-context run; `context` is the new length."""

    stage: Literal["long_context"]
    init: str  # MODEL: a folder, a .gguf file or a hub name
    rope_theta: float = Field(default=1_000_000.0, gt=0)  # the new base
    long_tokens: int | None = Field(default=None, gt=1)
    """Documents of so many tokens count as long; None: of the length that `init` is trained on."""
    long_share: float = Field(default=0.7, gt=0, lt=1)  # of the tokens; the rest is short text
    packing: Packing = "stream"  # as in pre-training
    held_out_documents: int = Field(default=64, gt=0)
    """How many of the long documents of `held_out` are read for perplexity by position, which is
    measured before and after: 2M tokens at 32,768 each."""

    def first_weights(self) -> FirstWeights:
        """Those of `init`, for the new context."""
        changes = {
            "rope_theta": self.rope_theta,
            "max_position_embeddings": self.context,
            "yarn": None,
            "dual_chunk": None,
        }
        return StoredWeights(self.init, tuple(changes.items()))


def long_context(
    recipe: LongContextRecipe, before: Callable[[], None] | None = None
) -> StageResult:
    """Run or resume `recipe`; a finished run is left as it is. See stage.py for its folder.

    `before` is called when `out` is claimed and nothing is trained: to measure `init` as it was.

    Raises:
        UserError: data, tokenizer and model do not fit each other, `context` is shorter than what
            `init` is trained on, `out` holds another run, the disk is full, or the loss stays
            non-finite.
    """
    set_threads(recipe.threads)
    keep_freed_memory()
    before_it = load_config(recipe.init)
    if recipe.context < before_it.trained_length:
        raise UserError(
            f"context {recipe.context}: {recipe.init} is trained on {before_it.trained_length} "
            "tokens already, by its max_position_embeddings; give at least as many"
        )
    shards, tokenizer = open_data(recipe, before_it, recipe.init)
    first = recipe.first_weights()
    with world_of(recipe, first.config) as world:
        claim(recipe)
        if before is not None:
            from_first(before)
        torch.manual_seed(recipe.seed)
        loader = build_loader(recipe, before_it, shards, world.dp_rank, world.mesh.dp)
        trainee = make_trainee(first, recipe, world)
        return run_stage(recipe, trainee, loader, tokenizer)


def build_loader(
    recipe: LongContextRecipe,
    config: ModelConfig,
    source: TokenSource,
    rank: int = 0,
    world_size: int = 1,
) -> PhasedLoader:
    """The batches of `recipe` for one rank, from the documents of `source`."""
    plan = [stretch.shared(world_size) for stretch in recipe.plan]
    how = recipe.context, plan[0].rows, recipe.seed, rank, world_size, recipe.packing
    return PhasedLoader(plan, [PackedLoader(mix(recipe, config, source), *how)])


def mix(recipe: LongContextRecipe, config: ModelConfig, source: TokenSource) -> LongMixture:
    """The documents with their share of long ones; says what that took."""
    least = recipe.long_tokens or config.trained_length
    mixture = LongMixture(source, least, recipe.long_share)
    count = f"{mixture.long_documents:,} of {len(source.lengths):,} documents"
    if not mixture.long_documents:
        say(f"no document has {least:,} tokens: the data stay as they are; lower long_tokens?")
    elif mixture.repeats == 1:
        say(f"{count} are long, {mixture.long_share:.0%} of the tokens: the data stay as they are")
    else:
        say(
            f"{count} are long, {mixture.long_share:.0%} of the tokens when each comes "
            f"{mixture.repeats:.1f} times"
        )
    return mixture
