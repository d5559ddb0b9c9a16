"""Stage `contamination`: documents that hold what a test set asks, with the evidence."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import asdict

import pyarrow as pa

from qwen2.common.errors import UserError
from qwen2.corpus.decontaminate import Decontaminator, EvalItem
from qwen2.corpus.documents import Document
from qwen2.corpus.sketches import in_batches
from qwen2.pipeline.corpus.duplicates import read_rows, unique_rows
from qwen2.pipeline.corpus.judge import write_table
from qwen2.pipeline.corpus.layout import Layout
from qwen2.pipeline.corpus.recipe import Decontamination
from qwen2.tokenizer import Tokenizer

PUBLISHED = "qwen2"
SPAN = pa.list_(pa.int64(), 2)
HITS = pa.schema(
    [
        pa.field("id", pa.string()),  # of the document
        pa.field("test_set", pa.string()),
        pa.field("item", pa.string()),
        pa.field("length", pa.int64()),
        pa.field("share", pa.float64()),
        pa.field("document_tokens", pa.int64()),
        pa.field("item_tokens", pa.int64()),
        pa.field("document_span", SPAN),
        pa.field("item_span", SPAN),
        pa.field("matched", pa.string()),
        pa.field("asked", pa.string()),  # the item's text
    ]
)


def search_part(layout: Layout, part: str) -> dict[str, int]:
    """Write the hits of the documents of `part` that are no duplicates; how many there are."""
    recipe = layout.recipe.decontamination
    assert recipe is not None
    search, asked = _search(recipe.model_dump_json())
    rows = []
    for batch in in_batches(read_rows(layout, part, unique_rows(layout, part))):
        for document, hits in zip(batch, search.hits([d.text for d in batch]), strict=True):
            rows += [
                {"id": document.id, **asdict(hit), "asked": asked[hit.test_set, hit.item]}
                for hit in hits
            ]
    write_table(layout.file("contamination", part), pa.Table.from_pylist(rows, HITS))
    return {"hits": len(rows)}


def open_tokenizer(name: str) -> Tokenizer:
    """The published vocabulary, or that of a folder."""
    return Tokenizer.qwen2() if name == PUBLISHED else Tokenizer.load(name)


@functools.lru_cache(maxsize=1)  # once a process
def _search(recipe: str) -> tuple[Decontaminator, dict[tuple[str, str], str]]:
    wanted = Decontamination.model_validate_json(recipe)
    items = list(_items(wanted))
    if not items:
        raise UserError("decontamination: the test sets have no items; look at their paths")
    asked = {(item.test_set, item.id): item.text for item in items}
    return Decontaminator(items, open_tokenizer(wanted.tokenizer).encode, wanted.rule), asked


def _items(recipe: Decontamination) -> Iterator[EvalItem]:
    for source in recipe.test_sets:
        for split in source.splits():
            for thing in source.read(split):
                if isinstance(thing, Document):
                    yield EvalItem(source.name, thing.id, thing.text)
