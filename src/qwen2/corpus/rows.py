"""Rows of Arrow files, numbered through all files of a corpus, read without loading the files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from qwen2.common.config import one_line
from qwen2.common.errors import UserError


@dataclass(frozen=True)
class Rows:
    """The rows of several files of one schema, one file after the other, read where needed."""

    paths: tuple[Path, ...]
    schema: pa.Schema
    batches: NDArray[np.int64]
    """First row of each record batch, and the number of rows in all at the end."""
    places: tuple[tuple[int, int], ...]
    """File and number in it of each record batch."""
    file_rows: NDArray[np.int64]
    """First row of each file, and the number of rows in all at the end."""

    @classmethod
    def open(cls, paths: Sequence[Path], schema: pa.Schema) -> Rows:
        """Look at the files' structure.

        Raises:
            UserError: a file is not there, damaged, or made by other settings.
        """
        lengths: list[int] = []
        places: list[tuple[int, int]] = []
        files = [0]
        for number, path in enumerate(paths):
            reader = open_table(path, schema)
            here = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
            places += [(number, i) for i in range(len(here))]
            lengths += here
            files.append(files[-1] + sum(here))
        starts = np.cumsum([0, *lengths])
        return cls(tuple(paths), schema, starts, tuple(places), np.array(files))

    def __len__(self) -> int:
        return int(self.batches[-1])

    def __iter__(self) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Each record batch with its first row."""
        opened = -1
        for first, (file, i) in zip(self.batches.tolist(), self.places, strict=False):
            if file != opened:
                reader, opened = open_table(self.paths[file], self.schema), file
            yield first, reader.get_batch(i)

    def take(self, rows: NDArray[np.int64], columns: Sequence[str]) -> pa.Table:
        """`columns` of `rows`, in the order of `rows`."""
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        of = np.searchsorted(self.batches, ordered, "right") - 1
        parts = [self.schema.empty_table().select(columns)]
        opened = -1
        for at in np.unique(of):
            file, i = self.places[at]
            if file != opened:
                reader, opened = open_table(self.paths[file], self.schema), file
            low, high = np.searchsorted(of, [at, at + 1])
            batch = reader.get_batch(i).select(columns)
            parts.append(pa.table(batch.take(pa.array(ordered[low:high] - self.batches[at]))))
        back = np.empty(len(rows), np.int64)
        back[order] = np.arange(len(rows))
        return pa.concat_tables(parts).combine_chunks().take(pa.array(back))


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
