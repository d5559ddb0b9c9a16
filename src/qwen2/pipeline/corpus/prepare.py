"""Stage `documents`: read the sources, find languages, edit and measure; keep everything.

A task is a split of a source; it leaves parts of about `part_megabytes` of text, each a durable
folder that says how far into the split it reaches. A split that was cut short goes on behind its
last part, which is all that the cut can cost. What a part holds depends on the source alone, so a
split read in ten goes leaves the bytes of one read in one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qwen2.common.errors import UserError
from qwen2.common.files import durable_folder, durable_write, remove_leftovers
from qwen2.corpus.documents import Document, table_of
from qwen2.corpus.files import Skipped
from qwen2.corpus.filters.sets import STATISTICS, FilterSet
from qwen2.corpus.filters.unicode import repair
from qwen2.corpus.language import Identified, agreement, canonical, identify
from qwen2.corpus.readers import Source, Split
from qwen2.pipeline.corpus.layout import DOCUMENTS, FACTS, QUARANTINE, Layout, PartFacts
from qwen2.pipeline.corpus.recipe import CorpusRecipe, LanguageRule
from qwen2.pipeline.workers import stopping

PLAN = "splits.json"
MOST_SPLITS = 100_000  # their numbers have five digits
OVERHEAD = 256  # bytes of a document beside its text, so that empty ones fill parts too
ROW_GROUP = 4096

QUARANTINED = pa.schema(
    [
        ("kind", pa.string()),
        ("reason", pa.string()),
        ("place", pa.string()),
        ("excerpt", pa.string()),
    ]
)


def plan_splits(layout: Layout) -> list[str]:
    """The tasks: each split of each source, by number; kept, so that a later start has the same.

    Raises:
        UserError: a source has other files than when the run began, or there are too many.
    """
    planned = [
        {"number": 0, "source": source.name, "split": split.model_dump(mode="json")}
        for source in layout.recipe.sources
        for split in source.splits()
    ]
    for number, entry in enumerate(planned):
        entry["number"] = number
    if len(planned) > MOST_SPLITS:
        raise UserError(
            f"the sources have {len(planned):,} splits, a run at most {MOST_SPLITS:,}; make a run "
            "of some of them, and the next with it in duplicates.older"
        )
    path = layout.place("documents") / PLAN
    text = json.dumps(planned, indent=1, ensure_ascii=False)
    if path.exists():
        if path.read_text(encoding="utf-8") != text:
            raise UserError(
                f"{path}: the sources have other files than when this run began; "
                "choose another --out for them"
            )
    else:
        durable_write(path, text.encode())
    return [f"{number:05d}" for number in range(len(planned))]


def unread(layout: Layout, splits: Sequence[str]) -> list[str]:
    """The splits that are not read to their end."""
    remove_leftovers(layout.place("documents"))
    return [split for split in splits if not _progress(layout, split)[1]]


def read_split(layout: Layout, split: str) -> dict[str, Any]:
    """Read what is left of a split, part by part; what its parts hold together."""
    recipe = layout.recipe
    entry = json.loads((layout.place("documents") / PLAN).read_text())[int(split)]
    source = next(s for s in recipe.sources if s.name == entry["source"])
    number, done, cursor = _progress(layout, split)
    if not done:
        things = itertools.islice(source.read(Split.parse(entry["split"])), cursor, None)
        for things_of_part, last in _in_parts(things, int(recipe.part_megabytes * 1e6)):
            if stopping():
                break
            cursor += len(things_of_part)
            _write_part(layout.part(f"{split}-{number:05d}"), recipe, source, things_of_part,
                        cursor, last)  # fmt: skip
            number += 1
    facts = [layout.facts(part) for part in layout.parts_of(split)]
    return {
        key: sum(getattr(part, key) for part in facts)
        for key in ("documents", "quarantined", "bytes")
    }


def _progress(layout: Layout, split: str) -> tuple[int, bool, int]:
    """Parts that a split has, whether it is at its end, and the things that it has read."""
    parts = layout.parts_of(split)
    if not parts:
        return 0, False, 0
    facts = layout.facts(parts[-1])
    return len(parts), facts.last, facts.cursor


def _in_parts(
    things: Iterable[Document | Skipped], size: int
) -> Iterator[tuple[list[Document | Skipped], bool]]:
    """The things of each part, and whether nothing follows; one part at least."""
    part: list[Document | Skipped] = []
    filled = 0
    for thing in things:
        if filled >= size:
            yield part, False
            part, filled = [], 0
        part.append(thing)
        filled += OVERHEAD + (len(thing.text) if isinstance(thing, Document) else 0)
    yield part, True


def _write_part(
    folder: Path,
    recipe: CorpusRecipe,
    source: Source,
    things: Sequence[Document | Skipped],
    cursor: int,
    last: bool,
) -> None:
    documents = [thing for thing in things if isinstance(thing, Document)]
    skipped = [thing for thing in things if isinstance(thing, Skipped)]
    size = 0
    with durable_folder(folder) as partial:
        with pq.ParquetWriter(partial / DOCUMENTS, SCHEMA, compression="zstd") as writer:
            for table, read in _prepared(documents, recipe, source):
                writer.write_table(table, row_group_size=ROW_GROUP)
                size += read
        rows = [
            {"kind": s.kind, "reason": s.reason, "place": s.source, "excerpt": s.excerpt}
            for s in skipped
        ]
        pq.write_table(pa.Table.from_pylist(rows, QUARANTINED), partial / QUARANTINE)
        facts = PartFacts(
            source=source.name,
            cursor=cursor,
            last=last,
            documents=len(documents),
            quarantined=len(skipped),
            bytes=size,
        )
        (partial / FACTS).write_text(json.dumps(facts.model_dump()))


ADDED = [
    pa.field("languages", pa.string()),  # shares of what was found, JSON
    pa.field("found_language", pa.string()),
    pa.field("language_score", pa.float64()),
    pa.field("agreement", pa.float64()),  # of the text with the source's label
    pa.field("label", pa.string()),  # the source's own
    pa.field("edits", pa.string()),  # what the editors did, JSON
    pa.field("bytes", pa.int64()),  # of the text as it is here
]
SCHEMA = pa.schema(
    [*table_of([]).schema, *ADDED, *(pa.field(name, pa.float64()) for name in STATISTICS)]
)
"""Columns of documents.parquet; `language` is the one that holds."""


def _prepared(
    documents: Sequence[Document], recipe: CorpusRecipe, source: Source
) -> Iterator[tuple[pa.Table, int]]:
    """Tables of documents that are edited and measured, and the bytes that were read."""
    filters = recipe.filters[source.filters]
    rule = recipe.language if filters.measures != "code" else None
    for low in range(0, len(documents), ROW_GROUP):
        some = documents[low : low + ROW_GROUP]
        read = sum(len(document.text.encode("utf-8", "surrogatepass")) for document in some)
        yield _table(some, rule, filters), read


def _table(
    documents: Sequence[Document], rule: LanguageRule | None, filters: FilterSet
) -> pa.Table:
    texts = [repair(document.text) for document in documents]
    found = [identify(text, rule) if rule else None for text in texts]
    labels = [document.language and canonical(document.language) for document in documents]
    agreements = [
        agreement(label, one) if label and one else None
        for label, one in zip(labels, found, strict=True)
    ]
    languages = [
        _language(label, one, agreed, rule)
        for label, one, agreed in zip(labels, found, agreements, strict=True)
    ]
    edited = filters.measure(texts, languages)
    kept = [
        Document(text, d.id, d.source, d.kind, d.licence, language, d.group, d.metadata)
        for d, text, language in zip(documents, edited.texts, languages, strict=True)
    ]
    nothing = np.full(len(documents), np.nan)
    columns: dict[str, Any] = {
        "languages": [one and json.dumps(one.shares) for one in found],
        "found_language": [one and one.language for one in found],
        "language_score": [one and one.score for one in found],
        "agreement": agreements,
        "label": labels,
        "edits": [json.dumps(done) if done else None for done in edited.edits],
        "bytes": [document.size for document in kept],
    } | {name: pa.array(edited.numbers.get(name, nothing), from_pandas=True) for name in STATISTICS}
    table = table_of(kept)
    for field in SCHEMA:
        if field.name in columns:
            table = table.append_column(field, pa.array(columns[field.name], field.type))
    return table


def _language(
    label: str | None, found: Identified | None, agreed: float | None, rule: LanguageRule | None
) -> str | None:
    """The language that holds: the source's, unless the text speaks against it."""
    if found is None or rule is None:
        return label
    if label is not None and (agreed is None or agreed >= rule.agreement):
        return label
    return found.language
