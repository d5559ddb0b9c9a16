"""The batches of a training recipe, of a run, or of a folder of shards, to be looked at."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import Field

from qwen2.common.config import Config, read_overrides, read_values
from qwen2.common.errors import UserError
from qwen2.common.files import sha256_of
from qwen2.common.progress import say
from qwen2.common.recipes import find_recipe
from qwen2.model.hub import load_config
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.loader import PackedLoader, Packing
from qwen2.tokens.shard_index import INDEX
from qwen2.tokens.shards import Shards
from qwen2.tokens.weighted import WeightedLoader, by_kind
from qwen2.train import long_context, pretrain
from qwen2.train.long_context import LongContextRecipe
from qwen2.train.phases import PhasedLoader, Stretch
from qwen2.train.pretrain import PretrainRecipe
from qwen2.train.stage import StageRecipe

RECIPE, TOKENIZER = "recipe.yaml", "tokenizer"


class BatchShape(Config):
    """How a folder of shards is read when no recipe says it."""

    context: int = Field(default=2048, gt=0)
    rows: int = Field(default=4, gt=0)
    seed: int = Field(default=0, ge=0)
    packing: Packing = "stream"
    weights: dict[str, float] | None = None


@dataclass(frozen=True)
class Batches:
    """Shards, the tokenizer that made them, and how they are read."""

    shards: Shards
    tokenizer: Tokenizer
    loader: Callable[[int, int], PhasedLoader]
    """The loader of a rank of so many."""

    def at(self, step: int, rank: int, world_size: int) -> list[PackedLoader]:
        """Loaders that stand before each batch of a step, counted from 1 as in metrics.jsonl.

        Raises:
            UserError: there is no such rank.
        """
        return self.loader(rank, world_size).before_step(step - 1)


def open_batches(
    where: str, overrides: Sequence[str] = (), tokenizer: Path | None = None
) -> Batches:
    """What there is to look at in `where`.

    Args:
        where: a folder of shards or one that holds such, the folder of a training run, or a
            training recipe by file or name.
        overrides: `key=value` for the recipe, or for `BatchShape`.
        tokenizer: None: the recipe's, or the one beside the shards that made them.

    Raises:
        UserError: it is none of these, or has no tokenizer.
    """
    folder = Path(where)
    if not folder.is_dir():
        return _of_recipe(find_recipe(where), overrides, tokenizer)
    if not (folder / INDEX).is_file() and (folder / RECIPE).is_file():
        return _of_recipe(folder / RECIPE, overrides, tokenizer)
    shards = Shards(_shards_in(folder))
    shape = BatchShape.parse(read_overrides(overrides), where)

    def loader(rank: int, world_size: int) -> PhasedLoader:
        how = shape.context, shape.rows, shape.seed, rank, world_size, shape.packing
        plan = [Stretch(0, 1, shape.context, shape.rows, 1)]
        if shape.weights is None:
            return PhasedLoader(plan, [PackedLoader(shards, *how)])
        return PhasedLoader(plan, [WeightedLoader(by_kind(shards), shape.weights, *how)])

    return Batches(shards, _tokenizer(shards, tokenizer), loader)


def _of_recipe(path: Path, overrides: Sequence[str], tokenizer: Path | None) -> Batches:
    values = read_values(path, overrides)
    stage = values.get("stage", "pretrain")
    if stage == "pretrain":
        pretraining = PretrainRecipe.parse(values, str(path))
        recipe: StageRecipe = pretraining
        shards = Shards(recipe.data)
        loader = partial(pretrain.build_loader, pretraining, shards)
    elif stage == "long_context":
        longer = LongContextRecipe.parse(values, str(path))
        recipe, shards = longer, Shards(longer.data)
        config = load_config(longer.init)
        loader = partial(long_context.build_loader, longer, config, shards)
    else:
        raise UserError(f"{path}: stage {stage!r} reads no shards; give one of pre-training")
    coder = _tokenizer(shards, tokenizer or recipe.tokenizer)
    return Batches(shards, coder, loader)


def _shards_in(folder: Path) -> Path:
    """`folder`, or the one folder of shards in it: of training, where some are held out."""
    if (folder / INDEX).is_file():
        return folder
    found = sorted(path.parent for path in folder.glob(f"**/{INDEX}"))
    training = [path for path in found if path.name == "train"] or found
    if len(training) == 1:
        return training[0]
    if found:
        raise UserError(f"{folder}: holds several folders of shards; give {found[0]}, say")
    raise UserError(f"{folder}: neither shards ({INDEX}) nor a training run ({RECIPE})")


def _tokenizer(shards: Shards, given: Path | None) -> Tokenizer:
    wanted = shards.index.tokenizer
    if given is not None:
        coder = Tokenizer.load(given)
        if _fingerprint(given) != wanted:
            say(f"{given}: not the tokenizer that made {shards.folder}; its text may be wrong")
        return coder
    folder = shards.folder.resolve()
    for near in (folder, *list(folder.parents)[:3]):
        for place in (near, near / TOKENIZER):
            if _fingerprint(place) == wanted:
                return Tokenizer.load(place)
    published = Tokenizer.qwen2()
    with tempfile.TemporaryDirectory() as saved:
        published.save(saved)
        if _fingerprint(Path(saved)) == wanted:
            return published
    raise UserError(f"{shards.folder}: the tokenizer that made it is not near; give --tokenizer")


def _fingerprint(folder: Path) -> str | None:
    """What shards say of the tokenizer in `folder`, when there is one."""
    path = folder / "tokenizer.json"
    return sha256_of(path) if path.is_file() else None
