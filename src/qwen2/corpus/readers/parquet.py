"""Parquet files, local or remote: only the columns that are wanted, a batch of rows at a time.

A file that is large is cut into ranges of row groups. A row group that cannot be read is skipped,
from the row on where it breaks, and the next one is read. Columns of bytes (images, vectors) are
left out, also inside structures: metadata are JSON.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from qwen2.common.config import one_line
from qwen2.corpus.files import Found, Skipped
from qwen2.corpus.readers.base import Range, Split
from qwen2.corpus.readers.places import Place, file_system
from qwen2.corpus.readers.records import RecordReader, plain
from qwen2.corpus.readers.streams import FileError, failure, open_file

BATCH_BYTES = 8 << 20  # of a batch of rows, unpacked, on average of its row group
BATCH_ROWS = 1024
BUFFER = 1 << 20
DAMAGE = (OSError, pa.ArrowException, ValueError)


class ParquetSource(RecordReader):
    """Files of Parquet."""

    format: Literal["parquet"]

    SUFFIXES: ClassVar[tuple[str, ...]] = (".parquet", ".pq")

    def _cut(self, place: Place, most: int) -> list[Range]:
        return row_groups(place, most)

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        return read_parquet(self, place, split)


def row_groups(place: Place, most: int) -> list[Range]:
    """The file as ranges of row groups of up to `most` bytes, or of one that is larger."""
    try:
        with open_file(place.url) as file:
            footer = pq.read_metadata(file)
    except (FileError, *DAMAGE):
        return []  # who reads it will say what is wrong
    rows = [footer.row_group(i).num_rows for i in range(footer.num_row_groups)]
    bytes_a_row = place.size / max(sum(rows), 1)
    starts = [0]
    size = 0.0
    for index, count in enumerate(rows):
        if index > starts[-1] and size + count * bytes_a_row > most:
            starts.append(index)
            size = 0.0
        size += count * bytes_a_row
    ends = [*starts[1:], len(rows)]
    return [
        Range(first=first, last=last, records=sum(rows[:first]))
        for first, last in zip(starts, ends, strict=True)
    ]


def read_parquet(source: RecordReader, place: Place, split: Split) -> Iterator[Found]:
    """The documents of one file of `source`; a record's number is that of its row, from 0."""
    fs, _ = file_system(place.url)
    with open_file(place.url) as opened:
        try:
            file = pq.ParquetFile(opened, buffer_size=BUFFER, page_checksum_verification=True)
            columns = _columns(source, file.schema_arrow)
        except DAMAGE as error:
            raise _damage(fs, place, error) from None
        if source.fields.text not in columns:
            known = ", ".join(file.schema_arrow.names)
            yield source.skipped(place, f"no field {source.fields.text!r}", "", known)
            return
        seen: set[bytes] = set()
        part = split.range or Range(first=0, last=file.num_row_groups)
        row = part.records
        for group in range(part.first, part.last):
            following = row + file.metadata.row_group(group).num_rows
            try:
                for batch in _batches(file, group, columns):
                    yield from _rows(source, place, batch, row, seen)
                    row += batch.num_rows
            except DAMAGE as error:
                where = f", rows {row} to {following - 1} (row group {group})"
                damage = _damage(fs, place, error)
                yield source.skipped(place, damage.reason, where, one_line(error))
            row = following


def _damage(fs: Any, place: Place, error: Exception) -> FileError:
    """What is wrong with the file, by what reading it raised; raises when its store is at fault."""
    # Arrow speaks of damage by OSError too, but without a number of the system.
    if isinstance(error, OSError) and error.errno is not None:
        found = failure(fs, place.url, error)
        if not isinstance(found, FileError):
            raise found from None
        return found
    return FileError("damaged Parquet file")


def _columns(source: RecordReader, schema: pa.Schema) -> list[str]:
    fields = source.fields.all
    wanted = None if source.metadata is None else fields | set(source.metadata)
    return [
        field.name
        for field in schema
        if (wanted is None or field.name in wanted)
        and not (pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type))
    ]


def _batches(file: pq.ParquetFile, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    facts = file.metadata.row_group(group)
    rows = BATCH_BYTES * facts.num_rows // max(facts.total_byte_size, 1)
    yield from file.iter_batches(max(1, min(rows, BATCH_ROWS)), [group], columns, use_threads=False)


def _rows(
    source: RecordReader, place: Place, batch: pa.RecordBatch, first: int, seen: set[bytes]
) -> Iterator[Found]:
    try:
        records: list[dict[str, Any]] | None = batch.to_pylist()
    except UnicodeDecodeError:
        records = None  # some row is to blame, and only that is skipped
    for index in range(batch.num_rows):
        where = f", row {first + index}"
        record = records[index] if records else _row(source, place, batch.slice(index, 1), where)
        if isinstance(record, Skipped):
            yield record
        else:
            text = source.fields.text
            plained = {n: v if n == text else plain(v) for n, v in record.items()}
            yield source.record(place, plained, first + index, where, seen)


def _row(
    source: RecordReader, place: Place, row: pa.RecordBatch, where: str
) -> dict[str, Any] | Skipped:
    try:
        record: dict[str, Any] = row.to_pylist()[0]
        return record
    except UnicodeDecodeError as error:
        return source.skipped(place, "not UTF-8", where, error.object, error.start)
