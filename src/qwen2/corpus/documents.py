"""Documents: the unit of the corpus, and their files (Parquet, zstd).

Everything in corpus/ takes and gives streams of `Document`, so memory stays bounded by one batch
whatever the size of the corpus. Report section 3.1 speaks of data by source and domain: `kind` is
that domain, and figures are given by kind everywhere.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from qwen2.common.config import one_line
from qwen2.common.errors import UserError

SCHEMA = pa.schema(
    [
        pa.field("text", pa.string(), nullable=False),
        pa.field("id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("licence", pa.string()),
        pa.field("language", pa.string()),
        pa.field("group", pa.string()),
        pa.field("metadata", pa.string()),  # a JSON object
    ]
)
ROW_GROUP_BYTES = 8 << 20
ROW_GROUP_DOCUMENTS = 8192


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One text and where it came from."""

    text: str
    id: str
    """Unique in the corpus and the same on every machine that has the text in the same place."""
    source: str
    """Path or URL it was read from."""
    kind: str
    """Domain: `code`, `docstrings`, `reference`, `prose`, `multilingual` ..."""
    licence: str | None = None
    """What the source says of its licence, if it does."""
    language: str | None = None
    """The source's own label of the natural language, if it has one."""
    group: str | None = None
    """Documents that share text have the same group, and a split never parts them."""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else the source says: title, date, URL, repository ...; JSON can hold it."""

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text.encode())

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Document:
        """The document of a row of `SCHEMA`'s columns."""
        metadata = row["metadata"]
        return cls(**{**row, "metadata": json.loads(metadata) if metadata else {}})


def table_of(documents: Sequence[Document]) -> pa.Table:
    """Documents as a table of `SCHEMA`."""
    columns = [[getattr(d, name) for d in documents] for name in SCHEMA.names[:-1]]
    columns.append([_as_json(d.metadata) if d.metadata else None for d in documents])
    arrays = [pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


def _as_json(value: Mapping[str, Any]) -> str:
    """Lone surrogates, which UTF-8 can't hold, are spelt as JSON spells them: \\ud800."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def write_documents(path: Path, documents: Iterable[Document]) -> int:
    """Stream `documents` into the Parquet file `path`; returns how many.

    The file is not durable by itself: write it inside a `durable_folder`.
    """
    count = 0
    with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
        for batch in in_batches(documents, ROW_GROUP_BYTES):
            writer.write_table(table_of(batch))
            count += len(batch)
    return count


def read_documents(path: Path, batch: int = 256) -> Iterator[Document]:
    """Stream the documents of a Parquet file in their order.

    Raises:
        UserError: no such file, not Parquet, damaged, or without the columns of a document.
    """
    try:
        with pq.ParquetFile(path) as file:
            missing = set(SCHEMA.names) - set(file.schema_arrow.names)
            if missing:
                raise UserError(f"{path}: no column {', '.join(sorted(missing))}; not documents")
            for record_batch in file.iter_batches(batch, columns=SCHEMA.names):
                for row in record_batch.to_pylist():
                    yield Document.from_row(row)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; collect the corpus first") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file: {one_line(error)}") from None


def in_batches(
    documents: Iterable[Document], size: int, most: int = ROW_GROUP_DOCUMENTS
) -> Iterator[list[Document]]:
    """Batches of about `size` bytes, and of at most `most` documents; none is empty."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += document.size
        if held >= size or len(batch) == most:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
