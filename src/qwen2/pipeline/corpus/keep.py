"""Stage `kept`: the documents that stay, to train on and held out apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qwen2.common.files import durable_folder, durable_write
from qwen2.corpus.documents import Document, read_documents, table_of
from qwen2.corpus.paragraphs import without_repeated
from qwen2.corpus.split import HeldOut, choose_held_out, key_of
from qwen2.pipeline.corpus.duplicates import chosen_rows, read_rows, unique_rows
from qwen2.pipeline.corpus.judge import read_table
from qwen2.pipeline.corpus.layout import DOCUMENTS, Layout

SIDES = ("train", "held_out")
CHOSEN = "held_out.json"
REMAINDER = "remainder.json"  # ids of documents that lost a paragraph and had too little left
KEPT = pa.schema([*table_of([]).schema, pa.field("row", pa.int64())])
"""Columns of train.parquet and held_out.parquet; `row`: of the part's documents.parquet."""


def choose_sides(layout: Layout) -> dict[str, Any]:
    """Choose which documents are held out, by their groups; kept in a file."""
    recipe = layout.recipe
    held = choose_held_out(_sizes(layout), recipe.held_out, recipe.seed)
    values = {"fraction": held.fraction, "seed": held.seed, "also": sorted(held.also)}
    durable_write(layout.place("kept") / CHOSEN, json.dumps(values, ensure_ascii=False).encode())
    return {"also": len(held.also)}


def keep_part(layout: Layout, part: str) -> dict[str, int]:
    """Write the documents of `part` that stay, to train on and held out apart."""
    values = json.loads((layout.place("kept") / CHOSEN).read_text())
    held = HeldOut(values["fraction"], values["seed"], frozenset(values["also"]))
    rows = unique_rows(layout, part)
    gone = contaminated(layout, part)
    keys = {facts["id"]: facts["key"] for facts in _facts(layout, part, rows)}
    sides: dict[str, list[tuple[Document, int]]] = {side: [] for side in SIDES}
    counts: Counter[str] = Counter()
    short: list[str] = []
    for document, row in _with_rows(layout, part, rows, short):
        if document.id not in gone:
            side = SIDES[keys[document.id] in held]
            sides[side].append((document, row))
            counts[side] += 1
            counts["bytes"] += document.size
    with durable_folder(layout.place("kept") / part) as partial:
        for side, kept in sides.items():
            table = table_of([document for document, _ in kept])
            table = table.append_column(KEPT.field("row"), pa.array([r for _, r in kept], "int64"))
            pq.write_table(table, partial / f"{side}.parquet", compression="zstd")
        (partial / REMAINDER).write_text(json.dumps(short, ensure_ascii=False))
    return dict(counts)


def kept_documents(layout: Layout, side: str) -> Iterator[Document]:
    """Stream the documents of a side, in the order of the sources.

    Raises:
        UserError: the stage `kept` is not finished.
    """
    for part in layout.parts:
        yield from read_documents(layout.place("kept") / part / f"{side}.parquet")


def _with_rows(
    layout: Layout, part: str, rows: NDArray[np.int64], short: list[str]
) -> Iterator[tuple[Document, int]]:
    """The documents of `rows` and their rows, without paragraphs that stay elsewhere.

    Args:
        short: gets the ids of those of which too little is left.
    """
    documents = read_rows(layout, part, rows)
    rule = layout.recipe.duplicates.paragraphs
    if rule is None:
        yield from zip(documents, rows.tolist(), strict=True)
        return
    row_of: dict[str, int] = {}

    def noted() -> Iterator[Document]:
        for document, row in zip(documents, rows.tolist(), strict=True):
            row_of[document.id] = row
            yield document

    place, number = layout.place("repeated"), layout.parts[part]
    for document in without_repeated(noted(), place, number, rule, Counter()):
        row = row_of.pop(document.id)
        short += row_of
        row_of.clear()
        yield document, row
    short += row_of


def contaminated(layout: Layout, part: str) -> frozenset[str]:
    """Ids of the documents of `part` that hold what a test set asks."""
    if not layout.has("contamination"):
        return frozenset()
    return frozenset(read_table(layout.file("contamination", part), ["id"])["id"].to_pylist())


def _sizes(layout: Layout) -> Iterator[tuple[str, str, int]]:
    """(kind, split key, bytes) of each document that is no duplicate and not contaminated."""
    for part in layout.parts:
        gone = contaminated(layout, part)
        for row in _facts(layout, part, unique_rows(layout, part)):
            if row["id"] not in gone:
                yield row["kind"], row["key"], row["bytes"]


def _facts(layout: Layout, part: str, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
    """id, kind, bytes and split key of the documents of these rows, without reading their text."""
    names = ["id", "kind", "group", "bytes"]
    table = pq.read_table(layout.part(part) / DOCUMENTS, columns=names).take(pa.array(rows))
    digests = read_table(layout.file("sketches", part), ["digest"])["digest"]
    places = np.searchsorted(chosen_rows(layout, part), rows)
    facts: list[dict[str, Any]] = table.to_pylist()
    for row, digest in zip(facts, digests.take(pa.array(places)).to_pylist(), strict=True):
        row["key"] = key_of(row["group"], digest)
    return facts
