"""What deduplication keeps of each document, in files: enough to compare it without its text.

A file of sketches (Arrow IPC, memory-mapped by its readers) has one row a document in the order of
the documents: id, priority, bytes, the 128-bit digest of the normalised text and the MinHash
signature, about 500 bytes. Each is made by itself (the map side, in any process); the files of a
corpus together are compared by near_duplicates.py, and kept they are the older set that a new
source is compared with.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

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
    schema = sketch_schema(family)
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


def signatures_of(column: pa.FixedSizeBinaryArray | pa.ChunkedArray, family: MinHash) -> U32:
    """The signatures (n, size) of a column of them; memory is shared where it is one piece."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return fixed_size(array, 4 * family.size).view(np.uint32)


def fixed_size(array: pa.FixedSizeBinaryArray, width: int) -> NDArray[np.uint8]:
    """The bytes (n, width) of an array of binaries that all have `width`."""
    data = np.frombuffer(array.buffers()[1] or b"", np.uint8)
    return data[array.offset * width : (array.offset + len(array)) * width].reshape(-1, width)


def sketch_schema(family: MinHash) -> pa.Schema:
    """The columns of a file of sketches, and the family of its signatures."""
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
