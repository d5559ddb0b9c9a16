"""The long-context stage with its measurement: perplexity by position before and after.

Beside what every run leaves (train/stage.py), a run with held-out documents has in its folder

    positions.json   loss by position of `init` as it was, and of the trained model
    positions.svg    both as lines
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen2.common.errors import UserError
from qwen2.common.files import durable_write
from qwen2.common.plot import standalone
from qwen2.common.progress import Progress
from qwen2.evaluate.positions import PositionNats, nats_by_position, position_chart
from qwen2.model.extend import with_config
from qwen2.model.hub import load_model
from qwen2.tokens.shards import Shards
from qwen2.train.long_context import LongContextRecipe, long_context
from qwen2.train.stage import StageResult
from qwen2.train.world import is_first_process

BEFORE, AFTER = "before", "after"


@dataclass(frozen=True)
class LongContextResult(StageResult):
    """A run and where its measurement lies."""

    positions: Path | None = None
    """positions.json; None where nothing is held out."""


def run_long_context(recipe: LongContextRecipe) -> LongContextResult:
    """Run or resume `recipe` and measure, each model once.

    Raises:
        UserError: no held-out document has `context` tokens; and see `long_context`.
    """
    if recipe.held_out is None:
        return LongContextResult(**vars(long_context(recipe)))
    documents = LongDocuments(Shards(recipe.held_out), recipe.context, recipe.held_out_documents)
    result = long_context(recipe, before=lambda: _measure(recipe, BEFORE, recipe.init, documents))
    if result.model is not None and is_first_process():
        _measure(recipe, AFTER, result.model, documents)
    return LongContextResult(**vars(result), positions=recipe.out / "positions.json")


def _measure(
    recipe: LongContextRecipe, moment: str, name: str | Path, documents: LongDocuments
) -> None:
    """Add the figures of model `name` to positions.json, unless they are there."""
    path = recipe.out / "positions.json"
    figures = _read(path)
    if moment in figures:
        return
    model = load_model(name, dtype=recipe.dtype, device=recipe.device).eval()
    own = model.config
    if own.max_position_embeddings < recipe.context:
        model = with_config(model, max_position_embeddings=recipe.context)
    by = nats_by_position(model, documents.read(f"positions {moment}"), recipe.context)
    figures[moment] = {
        "rope_theta": own.rope_theta,
        "trained_length": own.trained_length,
        "documents": documents.count,
        **asdict(by),
        "perplexity": by.perplexity,
    }
    # The figures last: while they are not there, the chart is made again.
    durable_write(path.with_suffix(".svg"), standalone(_chart(figures)).encode())
    durable_write(path, json.dumps(figures, indent=1).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    except ValueError:
        raise UserError(f"{path}: not readable as JSON; remove it to measure again") from None
    return figures


def _chart(figures: dict[str, Any]) -> str:
    return position_chart(
        {
            f"{moment}: base {at['rope_theta']:,.0f}, {at['trained_length']:,} tokens": (
                PositionNats(at["edges"], at["nats"], at["tokens"])
            )
            for moment, at in figures.items()
        }
    )


def read_positions(path: Path) -> dict[str, PositionNats]:
    """What positions.json holds, by moment: before and after."""
    return {
        moment: PositionNats(at["edges"], at["nats"], at["tokens"])
        for moment, at in _read(path).items()
    }


class LongDocuments:
    """The first `most` of `shards` that have `length` tokens, each from `<|endoftext|>` on.

    Raises:
        UserError: there is none.
    """

    def __init__(self, shards: Shards, length: int, most: int) -> None:
        self.shards, self.length = shards, length
        self._numbers = np.flatnonzero(shards.lengths >= length)[:most].tolist()
        if not self._numbers:
            raise UserError(
                f"held_out {shards.folder}: its longest document has {shards.lengths.max()} "
                f"tokens, context is {length}; hold out longer ones, or set held_out=null"
            )

    @property
    def count(self) -> int:
        """Documents that are read."""
        return len(self._numbers)

    def read(self, what: str) -> Iterator[Sequence[int]]:
        """`length` + 1 ids of each, while the progress of `what` is shown."""
        with Progress(what, self.count) as progress:
            for done, number in enumerate(self._numbers, 1):
                ids = self.shards.document(number)
                yield [self.shards.index.end_of_text, *ids[: self.length].tolist()]
                progress.update(done)
