"""Stages `sketches`, `duplicates`, `paragraphs`, `repeated`: what the corpus has twice.

Maps over the parts and joins over all of them; see corpus/near_duplicates.py and paragraphs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qwen2.corpus.documents import SCHEMA, Document
from qwen2.corpus.near_duplicates import dropped_rows, find_duplicates
from qwen2.corpus.paragraphs import find_repeated, write_paragraphs
from qwen2.corpus.sketches import write_sketches
from qwen2.pipeline.corpus.judge import read_table
from qwen2.pipeline.corpus.layout import DOCUMENTS, Layout

BATCH = 1024  # rows of text in memory


def chosen_rows(layout: Layout, part: str) -> NDArray[np.int64]:
    """The rows of a part that `decisions` keeps, ascending."""
    kept = read_table(layout.file("decisions", part), ["kept"])["kept"]
    return np.flatnonzero(kept.to_numpy())


def unique_rows(layout: Layout, part: str) -> NDArray[np.int64]:
    """The rows of a part that are kept after `duplicates`, ascending."""
    number = layout.parts[part]
    return np.delete(chosen_rows(layout, part), dropped_rows(layout.place("duplicates"), number))


def read_rows(layout: Layout, part: str, rows: NDArray[np.int64]) -> Iterator[Document]:
    """The documents of these rows of a part, ascending."""
    first = 0
    with pq.ParquetFile(layout.part(part) / DOCUMENTS) as file:
        for batch in file.iter_batches(BATCH, columns=SCHEMA.names):
            low, high = np.searchsorted(rows, [first, first + batch.num_rows])
            if low < high:
                for row in batch.take(pa.array(rows[low:high] - first)).to_pylist():
                    yield Document.from_row(row)
            first += batch.num_rows


def priority_of(layout: Layout, part: str) -> Callable[[Document], int]:
    """Of duplicates the one stays whose source stands first in the recipe."""
    names = [source.name for source in layout.recipe.sources]
    rank = len(names) - names.index(layout.facts(part).source)
    return lambda _: rank


def sketch_part(layout: Layout, part: str) -> dict[str, int]:
    """Sketch the documents that the filters left of `part`."""
    documents = read_rows(layout, part, chosen_rows(layout, part))
    family, path = layout.recipe.duplicates.minhash, layout.file("sketches", part)
    return {"documents": write_sketches(path, documents, family, priority_of(layout, part))}


def join_duplicates(layout: Layout) -> dict[str, Any]:
    """Compare all sketches with each other and with those of older runs."""
    recipe = layout.recipe.duplicates
    older = [
        run.file("sketches", part) for run in map(Layout.open, recipe.older) for part in run.parts
    ]
    files = [layout.file("sketches", part) for part in layout.parts]
    found = find_duplicates(layout.place("duplicates"), files, recipe.minhash, older)
    return {"documents": found.documents, "dropped": found.dropped, "clusters": found.clusters}


def digest_part(layout: Layout, part: str) -> dict[str, int]:
    """Note the paragraphs of the documents that are no duplicates."""
    rule = layout.recipe.duplicates.paragraphs
    assert rule is not None
    documents = read_rows(layout, part, unique_rows(layout, part))
    path = layout.file("paragraphs", part)
    return {"paragraphs": write_paragraphs(path, documents, rule, priority_of(layout, part))}


def join_paragraphs(layout: Layout) -> dict[str, Any]:
    """Which paragraphs other documents have too."""
    rule = layout.recipe.duplicates.paragraphs
    assert rule is not None
    files = [layout.file("paragraphs", part) for part in layout.parts]
    older = [
        run.file("paragraphs", part)
        for run in map(Layout.open, layout.recipe.duplicates.older)
        if run.has("paragraphs")
        for part in run.parts
    ]
    found = find_repeated(layout.place("repeated"), files, rule, older)
    return {"paragraphs": found.paragraphs, "removed": found.removed}
