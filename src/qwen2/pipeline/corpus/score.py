"""Stage `scores`: what the quality models think of each document, stored; nothing is decided here.

The linear classifier reads all documents; the models, which cost a thousand times as much, those
only that `bulk` lets through.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen2.corpus.quality.config import QualityConfig
from qwen2.corpus.quality.scorer import Columns, Scorer
from qwen2.pipeline.corpus.judge import write_table
from qwen2.pipeline.corpus.layout import DOCUMENTS, Layout
from qwen2.pipeline.corpus.recipe import Quality

BATCH = 512  # documents in memory at a time


def score_part(layout: Layout, part: str) -> dict[str, int]:
    """Write the scores of the documents of `part`, row by row."""
    recipe = layout.recipe.quality
    assert recipe is not None
    scorers = _scorers(recipe.scorers.model_dump_json())
    parts = [
        _scores(texts, languages, scorers, recipe) for texts, languages in _texts(layout, part)
    ]
    columns = {
        name: np.concatenate([np.empty(0), *(of[name] for of in parts)])
        for name in recipe.scorers.columns
    }
    arrays = {name: pa.array(values, pa.float64(), from_pandas=True) for name, values in
              columns.items()}  # fmt: skip
    write_table(layout.file("scores", part), pa.table(arrays))
    return {}


def _scores(
    texts: Sequence[str], languages: Sequence[str], scorers: Sequence[Scorer], recipe: Quality
) -> Columns:
    found: Columns = {}
    wanted = np.ones(len(texts), bool)
    for scorer in scorers:
        rows = np.flatnonzero(wanted).tolist()
        some = scorer([texts[row] for row in rows], [languages[row] for row in rows])
        for name, values in some.items():
            found[name] = np.full(len(texts), np.nan)
            found[name][rows] = values
        rule = recipe.bulk
        if rule is not None and rule.statistic in some:
            values = found[rule.statistic]
            least = -np.inf if rule.least is None else rule.least
            greatest = np.inf if rule.greatest is None else rule.greatest
            wanted = ~((values < least) | (values > greatest))  # none at all: let through
    return found


def _texts(layout: Layout, part: str) -> Iterator[tuple[list[str], list[str]]]:
    with pq.ParquetFile(layout.part(part) / DOCUMENTS) as file:
        for batch in file.iter_batches(BATCH, columns=["text", "language"]):
            languages = [language or "" for language in batch["language"].to_pylist()]
            yield batch["text"].to_pylist(), languages


@functools.lru_cache(maxsize=1)  # once a process
def _scorers(config: str) -> list[Scorer]:
    from qwen2.pipeline.quality import open_scorers  # brings torch, which other stages do without

    return open_scorers(QualityConfig.model_validate_json(config))
