"""How good each document of shards is: by a file, by the corpus run that made them, or anew."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qwen2.common.config import one_line
from qwen2.common.errors import UserError
from qwen2.common.progress import Progress
from qwen2.pipeline.corpus import Layout
from qwen2.pipeline.corpus.judge import read_table
from qwen2.pipeline.mixture.recipe import StoredScores
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.shard_file import open_origins
from qwen2.tokens.shards import Shards

Score = Callable[[bytes], float]
"""Quality of a document's text; more is better."""


def scores_of(
    given: Path | StoredScores | None, text: Shards, tokenizer: Path, score: Score
) -> NDArray[np.float64]:
    """(documents,) of `text`, in its order.

    Args:
        given: a Parquet file, or a corpus run; None: each text is decoded and given to `score`.

    Raises:
        UserError: they are not of these shards, or a document has none.
    """
    if given is None:
        coder = Tokenizer.load(tokenizer)
        return np.array([score(document) for document in _document_bytes(text, coder)])
    if isinstance(given, StoredScores):
        where, scores = given.run, _of_run(given, text)
    else:
        where, scores = given, _of_file(given)
    if len(scores) != len(text):
        raise UserError(f"{where}: {len(scores)} scores; the shards hold {len(text)} documents")
    if not np.isfinite(scores).all():
        raise UserError(f"{where}: a score is missing or not a number; score every document")
    return scores


def _of_file(path: Path) -> NDArray[np.float64]:
    try:
        column = pq.read_table(path, columns=["score"])["score"]
        return column.to_numpy().astype(np.float64)
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: no readable column 'score': {one_line(error)}") from None


def _of_run(given: StoredScores, text: Shards) -> NDArray[np.float64]:
    """By part and row, which the shards know of each document."""
    layout = Layout.open(given.run)
    quality = layout.recipe.quality
    columns = quality.scorers.columns if quality else ()
    if given.column not in columns:
        there = ", ".join(columns) or "none: its recipe has no `quality`"
        raise UserError(f"{given.run}: no scores {given.column!r}; there are {there}")
    found = []
    for entry in text.index.shards:
        origins = open_origins(text.folder / entry.name).read(["id", "part", "row"])
        scores = np.full(len(origins), np.nan)
        for part in origins["part"].unique().to_pylist():
            here = pc.equal(origins["part"], part).to_numpy()
            rows = origins["row"].to_numpy()[here]
            ids = origins["id"].filter(pa.array(here))
            if part not in layout.parts or not _same(layout, part, rows, ids):
                raise UserError(f"{given.run}: {text.folder / entry.name} is not of this run")
            table = read_table(layout.file("scores", part), [given.column])
            scores[here] = table[given.column].to_numpy()[rows]
        found.append(scores)
    return np.concatenate(found)


def _same(layout: Layout, part: str, rows: NDArray[np.int32], ids: pa.ChunkedArray) -> bool:
    """Whether documents of these ids stand in these rows of `part`."""
    there = read_table(layout.file("fates", part), ["id"])["id"]
    return bool(rows.max() < len(there)) and there.take(pa.array(rows)).equals(ids)


def _document_bytes(source: Shards, coder: Tokenizer) -> Iterator[bytes]:
    """The text of each document of `source`."""
    with Progress("score", len(source)) as progress:
        for number in range(len(source)):
            yield coder.decode_bytes(source.document(number)[:-1].tolist())
            progress.update(number + 1)
