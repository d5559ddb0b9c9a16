"""What deduplication keeps of each document, in files: enough to compare it without its text.

A file of sketches (Arrow IPC, memory-mapped by its readers) has one row a document in the order of
the documents: id, priority, bytes, the 128-bit digest of the normalised text and the MinHash
signature, about 500 bytes. Each is made by itself (the map side, in any process); the files of a
corpus together are compared by near_duplicates.py, and kept they are the older set that a new
source is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qwen2.common.config import one_line
from qwen2.common.errors import UserError
from qwen2.common.files import durable_file
from qwen2.corpus.dedup import DIGEST_BYTES, text_digest
from qwen2.corpus.documents import Document
from qwen2.corpus.minhash import U32, MinHash

BATCH_CHARACTERS = 1 << 20
BATCH_DOCUMENTS = 4096
FAMILY = b"minhash"


def write_sketches(
    path: Path,
    documents: Iterable[Document],
    family: MinHash,
    priority: Callable[[Document], int] = lambda _: 0,
) -> int:
    """Sketch `documents` into the file `path`, durably; returns how many.

    Args:
        priority: of duplicates, the one of the highest priority stays.

    Raises:
        UserError: `path` exists or the disk is full.
    """
    schema = _schema(family)
    count = 0
    with durable_file(path) as partial, pa.ipc.new_file(partial, schema) as writer:
        for batch in in_batches(documents):
            texts = [document.text for document in batch]
            signatures = family.signatures(texts)
            columns = [
                pa.array([document.id for document in batch]),
                pa.array([priority(document) for document in batch], pa.int32()),
                pa.array([document.size for document in batch], pa.int64()),
                pa.array([text_digest(text) for text in texts], pa.binary(DIGEST_BYTES)),
                pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(4 * family.size), len(batch), [None, pa.py_buffer(signatures)]
                ),
            ]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))
            count += len(batch)
    return count


def in_batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Batches of about `BATCH_CHARACTERS`, of one document at least."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class Sketches:
    """The rows of several files of sketches, one file after the other, read where needed."""

    paths: tuple[Path, ...]
    family: MinHash
    batches: NDArray[np.int64]
    """First row of each record batch, and the number of rows in all at the end."""
    places: tuple[tuple[int, int], ...]
    """File and number in it of each record batch."""
    file_rows: NDArray[np.int64]
    """First row of each file, and the number of rows in all at the end."""

    @classmethod
    def open(cls, paths: Sequence[Path], family: MinHash) -> Sketches:
        """Look at the files' structure.

        Raises:
            UserError: a file is not there, damaged, or of another family of hash functions.
        """
        lengths: list[int] = []
        places: list[tuple[int, int]] = []
        files = [0]
        for number, path in enumerate(paths):
            reader = open_table(path, _schema(family))
            here = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
            places += [(number, i) for i in range(len(here))]
            lengths += here
            files.append(files[-1] + sum(here))
        starts = np.cumsum([0, *lengths])
        return cls(tuple(paths), family, starts, tuple(places), np.array(files))

    def __len__(self) -> int:
        return int(self.batches[-1])

    def __iter__(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Each record batch with its first row."""
        for number, path in enumerate(self.paths):
            reader = open_table(path, _schema(self.family))
            for at, (file, i) in enumerate(self.places):
                if file == number:
                    yield int(self.batches[at]), reader.get_batch(i)

    def take(self, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """`columns` of `rows`, in the order of `rows`."""
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        of = np.searchsorted(self.batches, ordered, "right") - 1
        parts = [_schema(self.family).empty_table().select(columns)]
        opened = -1
        for at in np.unique(of):
            file, i = self.places[at]
            if file != opened:
                reader, opened = open_table(self.paths[file], _schema(self.family)), file
            low, high = np.searchsorted(of, [at, at + 1])
            batch = reader.get_batch(i).select(columns)
            parts.append(pa.table(batch.take(pa.array(ordered[low:high] - self.batches[at]))))
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pa.concat_tables(parts).combine_chunks().take(pa.array(back))


def signatures_of(column: pa.FixedSizeBinaryArray | pa.ChunkedArray, family: MinHash) -> U32:
    """The signatures (n, size) of a column of them; memory is shared where it is one piece."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return fixed_size(array, 4 * family.size).view(np.uint32)


def fixed_size(array: pa.FixedSizeBinaryArray, width: int) -> NDArray[np.uint8]:
    """The bytes (n, width) of an array of binaries that all have `width`."""
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


def open_table(path: Path, schema: pa.Schema) -> pa.RecordBatchFileReader:
    """An Arrow file, memory-mapped, that has exactly this schema.

    Raises:
        UserError: it is not there, damaged, or of something else.
    """
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make it from the documents first") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged, make it again: {one_line(error)}") from None
    if not reader.schema.equals(schema, check_metadata=True):
        raise UserError(f"{path}: made by other settings or for another use; make it again")
    return reader


def _schema(family: MinHash) -> pa.Schema:
    return pa.schema(
        [
            pa.field("id", pa.string()),
            pa.field("priority", pa.int32()),
            pa.field("bytes", pa.int64()),
            pa.field("digest", pa.binary(DIGEST_BYTES)),
            pa.field("signature", pa.binary(4 * family.size)),
        ],
        metadata={FAMILY: json.dumps(family.model_dump(), sort_keys=True).encode()},
    )
