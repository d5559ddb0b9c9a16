"""Duplicates and near-duplicates over a whole corpus, from its files of sketches.

Documents with the same digest, or with the same key in a band of their signatures, are connected;
what is connected, also by way of others, is one cluster. Of a cluster one document stays: the one
of the highest priority, of these the longest, of these the one with the smallest id. So the result
depends on the documents alone, not on their order, the number of files, or who wrote them.

Against an older set: its documents stay, whatever is found, and a cluster that has one of them
keeps none of the new. As all sketches of the older set are compared, also those of documents that
were removed from it, the new documents that stay are those that would have stayed had all been
compared together with the older ones first in priority.

Memory: 10 bytes a document, 24 a duplicate, and about 400 MB.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qwen2.common.config import Config
from qwen2.common.files import durable_folder
from qwen2.common.progress import Progress
from qwen2.corpus.documents import Document
from qwen2.corpus.join import I64, Components, Partitions
from qwen2.corpus.minhash import MinHash, has_words, similarity
from qwen2.corpus.rows import Rows
from qwen2.corpus.sketches import fixed_size, signatures_of, sketch_schema

CLUSTERS, DROPPED, SUMMARY = "clusters.parquet", "dropped.npy", "summary.json"
RULE = [("older", "descending"), ("priority", "descending"), ("bytes", "descending"),
        ("id", "ascending")]  # fmt: skip
TABLE = pa.schema(
    [
        pa.field("cluster", pa.string()),  # the id of the document that is kept
        pa.field("id", pa.string()),
        pa.field("kept", pa.bool_()),
        pa.field("older", pa.bool_()),  # of the older set
        pa.field("similarity", pa.float64()),  # estimated, to the document that is kept
        pa.field("file", pa.string()),  # name of its file of sketches
    ]
)
CHUNK = 1 << 19  # rows of clusters that are looked at together


class Found(Config):
    """What was found, and which rows of which file go."""

    documents: int
    """Of the new files."""
    dropped: int
    clusters: int
    """Of two documents at least."""
    ends: tuple[int, ...]
    """Of each new file, in the order given, the end of its rows in dropped.npy."""


def find_duplicates(
    folder: Path, files: Sequence[Path], family: MinHash, older: Sequence[Path] = ()
) -> Found:
    """Compare the documents of `files` with each other and with `older`; write into `folder`:

    clusters.parquet: the clusters with a document that goes, one row a document, first the one that
    is kept, then the new ones; dropped.npy: the rows to drop, file after file; summary.json.

    Raises:
        UserError: a file is damaged or of another family, `folder` exists, the disk is full.
    """
    sketches = Rows.open([*files, *older], sketch_schema(family))
    new = int(sketches.file_rows[len(files)])
    with durable_folder(folder) as partial:
        sets = _connect(sketches, family, partial)
        drop = np.zeros(new, bool)
        clusters = 0
        with pq.ParquetWriter(partial / CLUSTERS, TABLE, compression="zstd") as writer:
            for rows, roots in _clusters(sets):
                table, gone, count = _judge(sketches, family, rows, roots, new)
                writer.write_table(table)
                drop[gone] = True
                clusters += count
        gone = np.flatnonzero(drop)
        starts = sketches.file_rows[: len(files) + 1]
        owner = np.searchsorted(starts, gone, "right") - 1
        np.save(partial / DROPPED, gone - starts[owner])
        found = Found(
            documents=new,
            dropped=len(gone),
            clusters=clusters,
            ends=tuple(np.searchsorted(gone, starts[1:]).tolist()),
        )
        (partial / SUMMARY).write_text(json.dumps(found.model_dump(mode="json"), indent=1) + "\n")
    return found


def dropped_rows(folder: Path, number: int) -> I64:
    """The rows that are to be dropped of the file `number` of those given, ascending."""
    ends = (0, *Found.load(folder / SUMMARY).ends)
    return np.load(folder / DROPPED, mmap_mode="r")[ends[number] : ends[number + 1]]


def without(documents: Iterable[Document], dropped: I64) -> Iterator[Document]:
    """The documents whose place in the stream is not among `dropped`."""
    gone = set(dropped.tolist())
    return (document for i, document in enumerate(documents) if i not in gone)


def _connect(sketches: Rows, family: MinHash, folder: Path) -> Components:
    """Connect all rows that share a digest or a key of a band."""
    rows = len(sketches)
    bands = Partitions(_subfolder(folder, "bands"), family.bands, rows)
    digests = Partitions(_subfolder(folder, "digests"), 1, rows, words=2)
    with Progress("compare", 2 * rows) as progress:
        for first, batch in sketches:
            of = np.arange(first, first + batch.num_rows)
            digests.add(0, fixed_size(batch["digest"], 16).view(np.uint64), of)
            signatures = signatures_of(batch["signature"], family)
            words = has_words(signatures)
            keys = family.band_keys(signatures[words])
            for band in range(family.bands):
                bands.add(band, keys[:, band], of[words])
            progress.update(first + batch.num_rows)
        sets = Components(rows)
        for records in (digests, bands):
            for members, keys_of in records.runs():
                begins = np.flatnonzero(np.diff(keys_of, prepend=-1))
                sets.union(members, members[begins][keys_of])
        progress.update(2 * rows)
    for name in ("bands", "digests"):
        (folder / name).rmdir()
    return sets


def _subfolder(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _clusters(sets: Components) -> Iterator[tuple[I64, I64]]:
    """Rows and roots of whole clusters of two and more, about CHUNK rows at a time, by root."""
    size = len(sets.parent)
    for low in range(0, size, CHUNK):
        sets.roots(np.arange(low, min(low + CHUNK, size)))
    moved = np.flatnonzero(sets.parent != np.arange(size))  # all but the root of each cluster
    moved = moved[np.argsort(sets.parent[moved], kind="stable")]
    roots = sets.parent[moved]
    low = 0
    while low < len(moved):
        last = roots[min(low + CHUNK, len(moved)) - 1]
        high = int(np.searchsorted(roots, last, "right"))
        own = np.unique(roots[low:high])
        yield np.concatenate([own, moved[low:high]]), np.concatenate([own, roots[low:high]])
        low = high


def _judge(
    sketches: Rows, family: MinHash, rows: I64, roots: I64, new: int
) -> tuple[pa.Table, NDArray[np.int64], int]:
    """The table of these clusters, the rows that go, and how many clusters there are."""
    facts = sketches.take(rows, ["id", "priority", "bytes"])
    facts = facts.append_column("row", pa.array(rows)).append_column("root", pa.array(roots))
    facts = facts.append_column("older", pa.array((rows >= new).astype(np.int8)))
    facts = facts.sort_by([("root", "ascending"), *RULE])
    rows, roots = facts["row"].to_numpy(), facts["root"].to_numpy()
    first = np.diff(roots, prepend=-1) != 0
    cluster = np.cumsum(first) - 1
    best = rows[first][cluster]
    # Older documents other than the one that is kept say nothing of what goes.
    shown = first | (rows < new)
    alone = np.bincount(cluster[shown], minlength=cluster[-1] + 1) < 2
    shown &= ~alone[cluster]
    names = pa.array([path.name for path in sketches.paths])
    files = np.searchsorted(sketches.file_rows, rows[shown], "right") - 1
    table = pa.table(
        [
            facts["id"].combine_chunks().take(pa.array(np.flatnonzero(first)[cluster[shown]])),
            facts["id"].filter(pa.array(shown)),
            pa.array(first[shown]),
            pa.array(rows[shown] >= new),
            pa.array(_similarities(sketches, family, rows[shown], best[shown])),
            names.take(pa.array(files)),
        ],
        schema=TABLE,
    )
    return table, rows[shown & ~first], int((~alone).sum())


def _similarities(sketches: Rows, family: MinHash, a: I64, b: I64) -> NDArray[np.float64]:
    """Estimated Jaccard similarity of rows a[i] and b[i]; of equal digests 1."""
    parts = [np.empty(0)]
    for low in range(0, len(a), 1 << 16):
        ours, theirs = (
            sketches.take(x[low : low + (1 << 16)], ["digest", "signature"]) for x in (a, b)
        )
        estimated = similarity(
            signatures_of(ours["signature"], family),
            signatures_of(theirs["signature"], family),
        )
        equal = (
            fixed_size(ours["digest"].combine_chunks(), 16)
            == fixed_size(theirs["digest"].combine_chunks(), 16)
        ).all(axis=1)
        parts.append(np.where(equal, 1.0, estimated))
    return np.concatenate(parts)
