"""The text of an experiment (its own corpus, or given) as shards, and in a small vocabulary.

    corpus/                      the corpus run, when the text is made here
    small/train small/held-out   what proxies read: of each kind as much as one of them can use
    small/documents.npy          which documents of the full shards small/train has

Weights are shares of tokens of the full vocabulary, as the final training takes them. In the small
one a kind grows by `growth`, more for scripts whose tokens had no room, so proxies are given
weights times growth: the same text in the same proportions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qwen2.common.errors import UserError
from qwen2.common.progress import Progress
from qwen2.pipeline.corpus import run_corpus
from qwen2.pipeline.mixture.recipe import GivenShards, ProxyExperiment
from qwen2.pipeline.stages import Run, Stage
from qwen2.pipeline.workers import open_workers
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.packing import lay_epoch
from qwen2.tokens.remap import END_OF_TEXT, Remapping, most_used
from qwen2.tokens.shards import Shards, write_shards

E = TypeVar("E", bound=ProxyExperiment)

CORPUS = "corpus"
SMALL_TRAIN, SMALL_HELD_OUT = Path("small/train"), Path("small/held-out")


@dataclass(frozen=True)
class Text:
    """What the fit has to know of the text, kinds in their order."""

    kinds: list[str]
    tokens: NDArray[np.float64]
    """(D,) of the full vocabulary"""
    growth: NDArray[np.float64]
    """(D,) tokens of the small vocabulary for one of the full."""

    @classmethod
    def of(cls, run: Run[E]) -> Text:
        """As the stage `small` left it."""
        kinds = run.results["small"]["kinds"]
        tokens = np.array([kind["tokens"] for kind in kinds.values()], np.float64)
        growth = np.array([kind["growth"] for kind in kinds.values()], np.float64)
        return cls(list(kinds), tokens, growth)

    def row_weights(self, weights: NDArray[np.float64]) -> dict[str, float]:
        """(D,) shares of tokens -> shares of rows of the small vocabulary, by kind."""
        grown = weights * self.growth
        return dict(zip(self.kinds, (grown / grown.sum()).tolist(), strict=True))

    def named(self, values: NDArray[np.float64]) -> dict[str, float]:
        """(D,) figures by kind."""
        return dict(zip(self.kinds, values.tolist(), strict=True))


def corpus_stages(recipe: E, workers: int) -> list[Stage[E]]:
    """The corpus run of an experiment that is not given shards; it resumes by itself."""
    corpus = recipe.corpus
    if corpus is None:
        return []

    def collect(run: Run[E]) -> dict[str, Any]:
        with open_workers(workers) as pool:
            return dict(run_corpus(corpus, run.folder / CORPUS, pool).results["report"])

    return [Stage("collect", "Make a corpus and its shards", collect)]


def places(run: Run[E]) -> GivenShards:
    """Where shards and tokenizer lie, absolute: a recipe that names them runs from anywhere."""
    given = run.recipe.shards or GivenShards.parse({"run": run.folder / CORPUS})
    return GivenShards(**{name: Path(path).resolve() for name, path in given})


def small(run: Run[E]) -> dict[str, Any]:
    """As much of each kind as a proxy can read, in tokens of the small vocabulary.

    Raises:
        UserError: a kind has no held-out documents.
    """
    here, recipe = places(run), run.recipe
    train, held = Shards(here.train), Shards(here.held_out)
    kinds = [kind for kind, tokens in train.index.tokens_by_kind.items() if tokens]
    if absent := [kind for kind in kinds if not held.index.tokens_by_kind.get(kind)]:
        raise UserError(f"{here.held_out}: holds no {absent[0]}; hold out some of every kind")
    coder = Tokenizer.load(here.tokenizer)
    chosen = _sample(train, kinds, recipe.most_read, recipe.seed)
    with Progress("small vocabulary", 3) as progress:
        use = _use(train, chosen)
        progress.update(1)
        remapping = most_used(coder.ranks, coder.end_of_text_id, use, recipe.vocabulary)
        grown = _write(run.folder / SMALL_TRAIN, train, chosen, remapping)
        progress.update(2)
        tested = _held_out(held, kinds, remapping, recipe.evaluated_kilobytes * 1000)
        _write(run.folder / SMALL_HELD_OUT, held, tested, remapping)
        progress.update(3)
    np.save(run.folder / "small/documents.npy", np.concatenate(list(chosen.values())))
    return {
        "vocabulary": recipe.vocabulary,
        "kinds": {
            kind: {
                "tokens": train.index.tokens_by_kind[kind],
                "growth": grown[kind] / int(train.lengths[chosen[kind]].sum()),
                "held_out_bytes": sum(
                    int(remapping.byte_lengths[held.document(i)].sum()) for i in tested[kind]
                ),
            }
            for kind in kinds
        },
        "bytes_per_token": {
            "full": _bytes_per(train, chosen, remapping),
            "small": _bytes_per(train, chosen, remapping, sum(grown.values())),
        },
    }


Chosen = dict[str, NDArray[np.int64]]
"""Numbers of documents by kind, ascending."""


def _sample(source: Shards, wanted: list[str], most: int, seed: int) -> Chosen:
    """Of each kind documents drawn by `seed` until they have `most` tokens, or all."""
    order = lay_epoch(source.lengths, seed, 0).order
    kinds = source.kinds[order]
    chosen = {}
    for kind in wanted:
        numbers = order[kinds == source.index.kinds.index(kind)]
        before = np.cumsum(source.lengths[numbers]) - source.lengths[numbers]
        chosen[kind] = np.sort(numbers[before < most])
    return chosen


def _held_out(held: Shards, kinds: list[str], remapping: Remapping, most: int) -> Chosen:
    """The first documents of each kind, up to `most` bytes together; the first one whatever."""
    chosen = {}
    for kind in kinds:
        numbers = np.flatnonzero(held.kinds == held.index.kinds.index(kind))
        taken: list[int] = []
        size = 0
        for number in numbers.tolist():
            here = int(remapping.byte_lengths[held.document(number)].sum())
            if size + here <= most or not taken:
                taken.append(number)
                size += here
        chosen[kind] = np.array(taken, np.int64)
    return chosen


def _use(source: Shards, chosen: Chosen) -> NDArray[np.float64]:
    """(V,) how much each token is used, every kind counting alike, lest the largest have all."""
    use = np.zeros(source.index.vocab_size)
    for numbers in chosen.values():
        counts = np.zeros_like(use)
        for number in numbers.tolist():
            ids, times = np.unique(source.document(number), return_counts=True)
            counts[ids] += times
        use += counts / counts.sum()
    return use


def _write(target: Path, source: Shards, chosen: Chosen, remapping: Remapping) -> dict[str, int]:
    """Write the chosen documents in the small vocabulary; tokens by kind."""

    def documents() -> Iterator[tuple[str, NDArray[np.int64]]]:
        for kind, numbers in chosen.items():
            for number in numbers.tolist():
                yield kind, remapping.apply(source.document(number)[:-1])

    index = write_shards(
        target,
        documents(),
        vocab_size=len(remapping.vocabulary),
        end_of_text=END_OF_TEXT,
        tokenizer=f"{len(remapping.vocabulary)} tokens of {source.index.tokenizer}",
    )
    return index.tokens_by_kind


def _bytes_per(
    source: Shards, chosen: Chosen, remapping: Remapping, tokens: int | None = None
) -> float:
    numbers = np.concatenate(list(chosen.values()))
    size = sum(int(remapping.byte_lengths[source.document(i)].sum()) for i in numbers.tolist())
    return size / (tokens or int(source.lengths[numbers].sum()))
