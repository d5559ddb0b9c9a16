"""Answers on disk: what has been answered once is never asked for again.

`answers/00000.jsonl`, a segment for each start, is only ever appended to. A line is

    crc32 of the rest, 8 hexadecimal digits | key, 32 | JSON of the answer

and is on the disk before the next answer is waited for. A process that is killed leaves at most one
torn line, which its checksum tells; so does other damage, and what was there is asked for again.
A key that comes twice, after a failure was tried again, counts by its last line.

In memory an answer takes 20 bytes, whatever its length.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

from qwen2.common.errors import UserError
from qwen2.common.files import fsync
from qwen2.synthesis.generator import Answer

KEY = 32  # hexadecimal digits
INDEX = np.dtype([("key", "<u8"), ("segment", "<u4"), ("offset", "<u8")])
PIECE = 65_536  # entries of the index that are gathered at a time


class Answers:
    """The answers in `folder` as they were when it was opened."""

    def __init__(self, folder: Path) -> None:
        self.paths = segments(folder)
        self.damaged = 0
        """Lines whose checksum is wrong: at most one for each time that a process was killed."""
        pieces = [np.empty(0, INDEX)]
        for number, path in enumerate(self.paths):
            entries: list[tuple[int, int, int]] = []
            for offset, line in _lines(path):
                if line is None:
                    self.damaged += 1
                    continue
                entries.append((_short(line[0]), number, offset))
                if len(entries) == PIECE:
                    pieces.append(np.array(entries, INDEX))
                    entries = []
            pieces.append(np.array(entries, INDEX))
        index = np.concatenate(pieces)
        self._index = index[np.argsort(index["key"], kind="stable")]  # the last line stays last
        self._open: tuple[int, BinaryIO] | None = None

    def __len__(self) -> int:
        return len(self._index)

    def get(self, key: str) -> Answer | None:
        """The answer to the prompt with this key, if there is one."""
        keys, short = self._index["key"], np.uint64(_short(key))
        first, last = (int(np.searchsorted(keys, short, side)) for side in ("left", "right"))
        for entry in self._index[first:last][::-1]:
            found, text = self._read(int(entry["segment"]), int(entry["offset"]))
            if found == key:
                return Answer(**json.loads(text))
        return None

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _read(self, segment: int, offset: int) -> tuple[str, bytes]:
        if self._open is None or self._open[0] != segment:
            self.close()
            self._open = segment, self.paths[segment].open("rb")
        self._open[1].seek(offset)
        line = _parse(self._open[1].readline())
        if line is None:
            raise UserError(f"{self.paths[segment]}: damaged while it was read; run again")
        return line


class AnswerLog:
    """Appends answers to a segment of its own, made with the first."""

    def __init__(self, folder: Path) -> None:
        last = segments(folder)[-1:]
        self.path = folder / f"{int(last[0].stem) + 1 if last else 0:05}.jsonl"
        self._file: BinaryIO | None = None

    def add(self, key: str, answer: Answer) -> None:
        """Keep an answer: when this returns it is on the disk."""
        if self._file is None:
            self._file = self.path.open("xb")
            fsync(self.path.parent)
        rest = key.encode() + json.dumps(answer.as_json(), separators=(",", ":")).encode()
        self._file.write(b"%08x%s\n" % (zlib.crc32(rest), rest))
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the segment."""
        if self._file is not None:
            self._file.close()


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Inside the block no other process works in `folder`, which is made if it is not there.

    Raises:
        UserError: another one does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: two processes would only do work twice
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # ends with the process
        except OSError:
            raise UserError(f"{folder}: another process is at work there") from None
        yield


def segments(folder: Path) -> list[Path]:
    """The segments in the order in which they were written."""
    return sorted(folder.glob("[0-9]*.jsonl"))


def _lines(path: Path) -> Iterator[tuple[int, tuple[str, bytes] | None]]:
    """Where each line begins, and its key and JSON; None when it is damaged."""
    with path.open("rb") as file:
        offset = 0
        for line in file:
            yield offset, _parse(line)
            offset += len(line)


def _parse(line: bytes) -> tuple[str, bytes] | None:
    rest = line[8:-1]
    if not line.endswith(b"\n") or len(rest) <= KEY or line[:8] != b"%08x" % zlib.crc32(rest):
        return None
    return rest[:KEY].decode(), rest[KEY:]


def _short(key: str) -> int:
    return int(key[:16], 16)
