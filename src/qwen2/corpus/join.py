"""Which rows have the same key, for more keys than memory holds; and the sets that pairs make.

Records (key, row) are spread over files by the band and by the key, so that a file fits in memory,
and each is sorted by itself. Equal keys meet in the same file whatever the order in which they came
and whoever wrote them, so the result depends on the records alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qwen2.corpus.shingles import U64

I64 = NDArray[np.int64]
RECORDS = 1 << 21  # of a file: with what sorting takes, about 50 bytes each
BUFFERED = 1 << 22  # records held before they are written


class Partitions:
    """Records on disk, in files by band and range of the key.

    Memory: the greater of the two constants above times 50 bytes, or all records of one key if that
    is more. Disk: 8 bytes a word of a key and 8 a row.
    """

    def __init__(self, folder: Path, bands: int, rows: int, words: int = 1) -> None:
        """`words`: 64-bit words of a key. `rows`: of one band, at most; decides the files."""
        self.folder, self.bands, self.words = folder, bands, words
        self.ranges = max(1, -(-rows // RECORDS))
        self._buffers: dict[tuple[int, int], list[U64]] = {}
        self._buffered = 0

    def add(self, band: int, keys: U64, rows: I64) -> None:
        """Records of a band: keys (n,) or (n, words), the first word uniform, and rows (n,)."""
        keys = keys.reshape(len(rows), self.words)
        records = np.column_stack([keys, rows.astype(np.uint64)])
        of = ((keys[:, 0] >> np.uint64(32)) * np.uint64(self.ranges)) >> np.uint64(32)
        records = records[np.argsort(of, kind="stable")]
        cuts = np.searchsorted(np.sort(of), np.arange(1, self.ranges, dtype=np.uint64))
        for i, part in enumerate(np.split(records, cuts)):
            if len(part):
                self._buffers.setdefault((band, i), []).append(part)
        self._buffered += len(rows)
        if self._buffered >= BUFFERED:
            self._flush()

    def runs(self) -> Iterator[tuple[I64, I64]]:
        """For each file, the rows whose key others have too and the key that they have.

        Both (n,); keys are numbered from 0 within the file, and ascend; rows ascend within a key.
        The files are removed as they are read.
        """
        self._flush()
        for band in range(self.bands):
            for i in range(self.ranges):
                path = self._path(band, i)
                if not path.exists():
                    continue
                records = np.fromfile(path, np.uint64).reshape(-1, self.words + 1)
                path.unlink()
                records = records[np.lexsort(records.T[::-1])]
                new = np.ones(len(records), bool)
                new[1:] = (records[1:, :-1] != records[:-1, :-1]).any(axis=1)
                alone = new & np.append(new[1:], True)
                keys = np.cumsum(new) - 1
                yield (
                    records[~alone, -1].astype(np.int64),
                    np.unique(keys[~alone], return_inverse=True)[1],
                )

    def _flush(self) -> None:
        for (band, i), parts in self._buffers.items():
            with self._path(band, i).open("ab") as file:
                for part in parts:
                    part.tofile(file)
        self._buffers, self._buffered = {}, 0

    def _path(self, band: int, i: int) -> Path:
        return self.folder / f"{band:03d}-{i:05d}"


class Components:
    """Sets of rows that pairs connect: 8 bytes a row. A set is known by its smallest row."""

    def __init__(self, rows: int) -> None:
        self.parent = np.arange(rows)

    def union(self, a: I64, b: I64) -> None:
        """Connect a[i] with b[i] for all i."""
        while len(a):
            a, b = self.roots(a), self.roots(b)
            apart = a != b
            a, b = a[apart], b[apart]
            # Roots only ever point to smaller ones, so there are no circles; where several pairs
            # would move one root, the smallest wins and the others come again.
            np.minimum.at(self.parent, np.maximum(a, b), np.minimum(a, b))

    def roots(self, rows: I64) -> I64:
        """The smallest row of each row's set."""
        found = self.parent[rows]
        while True:
            above = self.parent[found]
            if (above == found).all():
                break
            found = above
        self.parent[rows] = found
        return found
