"""Paragraphs that other documents have too: each stays in one document and goes from all others.

A paragraph ends at an empty line. Two are the same when their normalised texts are (dedup.py). It
stays in the document that comes first by priority and then by id, as often as it is there, and is
removed from every other; of an older set it stays there alone. A document that has lost something
and has too little left is dropped. The result depends on the documents alone, not on their order or
files.

The map side writes the digests of each document's paragraphs into a file, 16 bytes each;
`find_repeated` joins them on disk; `without_repeated` edits the documents in a second pass.
Memory: 8 bytes a document, 16 a paragraph that is removed, and about 300 MB.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import NonNegativeInt

from qwen2.common.config import Config
from qwen2.common.files import durable_file, durable_folder
from qwen2.common.progress import Progress
from qwen2.corpus.dedup import DIGEST_BYTES, text_digest
from qwen2.corpus.documents import Document
from qwen2.corpus.join import I64, Partitions
from qwen2.corpus.rows import Rows
from qwen2.corpus.sketches import in_batches

EMPTY_LINES = re.compile(r"\n\s*\n")
REPEATED, REMOVED, SUMMARY = "repeated.parquet", "removed.npy", "summary.json"
BINARY = pa.large_binary()
CHUNK = 1 << 17  # rows of a table that are written together
TABLE = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("paragraph", pa.int64()),  # its number in the document, from 0
        pa.field("stays_in", pa.string()),  # id of the document that keeps it
        pa.field("older", pa.bool_()),  # whether that one is of the older set
    ]
)


class ParagraphRule(Config):
    """Which paragraphs are compared, and what is too little."""

    shortest: NonNegativeInt = 100
    """Bytes; shorter paragraphs stay wherever they are: headings, `Options:`, a closing brace."""
    remainder: NonNegativeInt = 200
    """Bytes; a document that has lost a paragraph and has less left is dropped."""


class Repeated(Config):
    """What was found."""

    paragraphs: int
    """Compared, of the new files."""
    removed: int
    ends: tuple[int, ...]
    """Of each new file, in the order given, the end of its entries in removed.npy."""


def paragraphs(text: str) -> list[str]:
    """The paragraphs of `text`, each with the empty lines that follow it: together, the text."""
    cuts = [0, *(match.end() for match in EMPTY_LINES.finditer(text)), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(cuts) if a < b]


def write_paragraphs(
    path: Path,
    documents: Iterable[Document],
    rule: ParagraphRule,
    priority: Callable[[Document], int] = lambda _: 0,
) -> int:
    """Write the digests of the documents' paragraphs into the file `path`, durably; how many.

    Raises:
        UserError: `path` exists or the disk is full.
    """
    schema, count = _schema(rule), 0
    with durable_file(path) as partial, pa.ipc.new_file(partial, schema) as writer:
        for batch in in_batches(documents):
            chosen = [_compared(document.text, rule) for document in batch]
            columns = [
                pa.array([document.id for document in batch]),
                pa.array([priority(document) for document in batch], pa.int32()),
                pa.array([b"".join(map(text_digest, c.values())) for c in chosen], BINARY),
                pa.array([np.array([*c], np.int32).tobytes() for c in chosen], BINARY),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            count += sum(map(len, chosen))
    return count


def find_repeated(
    folder: Path, files: Sequence[Path], rule: ParagraphRule, older: Sequence[Path] = ()
) -> Repeated:
    """Which paragraphs of the documents of `files` other documents have too; write into `folder`:

    repeated.parquet: each removal, and where the paragraph stays; removed.npy: (row of the file,
    number of the paragraph) file after file; summary.json.

    Raises:
        UserError: a file is damaged or of another rule, `folder` exists, the disk is full.
    """
    rows = Rows.open([*files, *older], _schema(rule))
    new = int(rows.file_rows[len(files)])
    with durable_folder(folder) as partial:
        (partial / "digests").mkdir()
        starts, records = _spread(rows, partial / "digests")
        parts = [np.empty((0, 2), np.int64)]
        for numbers, keys in records.runs():
            parts.append(_losers(rows, starts, numbers, keys, new))
        (partial / "digests").rmdir()
        lost = np.concatenate(parts)  # number of the paragraph, row of the document that keeps it
        lost = lost[np.argsort(lost[:, 0])]
        row = np.searchsorted(starts, lost[:, 0], "right") - 1
        number = np.empty(len(lost), np.int64)
        with pq.ParquetWriter(partial / REPEATED, TABLE, compression="zstd") as writer:
            for low in range(0, len(lost), CHUNK):
                part = slice(low, low + CHUNK)
                number[part] = _numbers(rows, row[part], lost[part, 0] - starts[row[part]])
                columns = [
                    rows.take(row[part], ["id"])["id"],
                    pa.array(number[part]),
                    rows.take(lost[part, 1], ["id"])["id"],
                    pa.array(lost[part, 1] >= new),
                ]
                writer.write_table(pa.table(columns, schema=TABLE))
        ends = rows.file_rows[: len(files) + 1]
        file = np.searchsorted(ends, row, "right") - 1
        np.save(partial / REMOVED, np.column_stack([row - ends[file], number]))
        found = Repeated(
            paragraphs=int(starts[new]),
            removed=len(lost),
            ends=tuple(np.searchsorted(row, ends[1:]).tolist()),
        )
        (partial / SUMMARY).write_text(json.dumps(found.model_dump(mode="json"), indent=1) + "\n")
    return found


def without_repeated(
    documents: Iterable[Document],
    folder: Path,
    number: int,
    rule: ParagraphRule,
    dropped: Counter[str],
) -> Iterator[Document]:
    """The documents of the file `number` of those given to `find_repeated`, edited.

    Args:
        documents: in the order in which `write_paragraphs` had them.
        dropped: counts, by kind, the documents of which too little is left.
    """
    ends = (0, *Repeated.load(folder / SUMMARY).ends)
    removed = np.load(folder / REMOVED, mmap_mode="r")[ends[number] : ends[number + 1]]
    at = 0
    for row, document in enumerate(documents):
        gone = set()
        while at < len(removed) and removed[at, 0] == row:
            gone.add(int(removed[at, 1]))
            at += 1
        if not gone:
            yield document
            continue
        edited = dataclasses.replace(document, text=_without(document.text, gone))
        if edited.size < rule.remainder:
            dropped[document.kind] += 1
        else:
            yield edited


def _compared(text: str, rule: ParagraphRule) -> dict[int, str]:
    """The paragraphs that are long enough to be compared, by number."""
    pieces = enumerate(paragraphs(text))
    return {i: piece for i, piece in pieces if len(piece.strip().encode()) >= rule.shortest}


def _without(text: str, gone: Set[int]) -> str:
    left = "".join(piece for i, piece in enumerate(paragraphs(text)) if i not in gone)
    return left.rstrip() + "\n" * text.endswith("\n") if left.strip() else ""


def _spread(rows: Rows, folder: Path) -> tuple[I64, Partitions]:
    """The number of each document's first paragraph, of all at the end; and records of digests."""
    starts = np.zeros(len(rows) + 1, np.int64)
    for first, batch in rows:
        sizes = pc.binary_length(batch["digests"]).to_numpy()
        starts[first + 1 : first + 1 + batch.num_rows] = sizes // DIGEST_BYTES
    np.cumsum(starts, out=starts)
    records = Partitions(folder, 1, int(starts[-1]), words=2)
    with Progress("paragraphs", len(rows)) as progress:
        for first, batch in rows:
            numbers = np.arange(starts[first], starts[first + batch.num_rows])
            data = b"".join(batch["digests"].to_pylist())
            records.add(0, np.frombuffer(data, np.uint64).reshape(-1, 2), numbers)
            progress.update(first + batch.num_rows)
    return starts, records


def _losers(rows: Rows, starts: I64, numbers: I64, keys: I64, new: int) -> I64:
    """(n, 2): of these paragraphs, those that go, and the row of the document that keeps each."""
    documents, which = np.unique(np.searchsorted(starts, numbers, "right") - 1, return_inverse=True)
    facts = rows.take(documents, ["id", "priority"])
    facts = facts.append_column("older", pa.array((documents >= new).astype(np.int8)))
    order = pc.sort_indices(
        facts, [("older", "descending"), ("priority", "descending"), ("id", "ascending")]
    ).to_numpy()
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    begins = np.flatnonzero(np.diff(keys, prepend=-1))
    best = np.minimum.reduceat(rank[which], begins) if len(begins) else begins
    owner = documents[order[best]][keys]
    goes = (owner != documents[which]) & (documents[which] < new)
    return np.column_stack([numbers[goes], owner[goes]])


def _numbers(rows: Rows, row: I64, place: I64) -> I64:
    """The number in its document of the paragraph that is at `place` among those compared."""
    documents, which = np.unique(row, return_inverse=True)
    column = rows.take(documents, ["numbers"])["numbers"].combine_chunks()
    starts = np.cumsum([0, *pc.binary_length(column).to_pylist()]) // 4
    flat = np.frombuffer(b"".join(column.to_pylist()), np.int32)
    return flat[starts[which] + place].astype(np.int64)


def _schema(rule: ParagraphRule) -> pa.Schema:
    return pa.schema(
        [
            pa.field("id", pa.string()),
            pa.field("priority", pa.int32()),
            pa.field("digests", BINARY),  # 16 bytes each
            pa.field("numbers", BINARY),  # of the paragraphs in the document, int32 each
        ],
        metadata={b"shortest": str(rule.shortest).encode()},
    )
