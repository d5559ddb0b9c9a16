"""Bytes of a file, unpacked by its suffix (.gz, .zst), in bounded memory; and lines of them.

What can go wrong with a file is said by `FileError`, after all that could be read before it was
given. A lost connection to a remote store is not the file's fault: that is a `UserError`, so that a
run stops there and goes on later, and does not put files into quarantine that are whole.
"""

from __future__ import annotations

import io
import sys
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from qwen2.common.config import one_line
from qwen2.common.errors import UserError
from qwen2.corpus.readers.places import file_system, is_local

BLOCK = 1 << 18
UNPACKED = 1 << 16  # bytes at a time out of a packed stream; so many can be lost before a damage
PACKED = (".gz", ".zst")
EXCERPT = 160  # characters
CONTEXT = 40  # characters before a position that an excerpt shows


class FileError(Exception):
    """Why a file, or the rest of it, cannot be read."""

    def __init__(self, reason: str, where: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.where = where


class Line(NamedTuple):
    """A line that is not empty, and where it stands in the unpacked file."""

    number: int
    """From 1, counting empty ones."""
    offset: int
    data: bytes
    """Without its end; only the beginning when it is longer than the limit."""
    is_whole: bool


def unpacked_name(name: str) -> str:
    """`name` without the suffix of what packed it."""
    for suffix in PACKED:
        name = name.removesuffix(suffix)
    return name


def open_file(url: str) -> Any:
    """The file as a seekable binary stream, as it is stored.

    Raises:
        FileError: it is gone or may not be read.
        UserError: its store is out of reach.
    """
    fs, path = file_system(url)
    try:
        return fs.open(path, "rb")
    except Exception as error:
        raise failure(fs, url, error) from None


def failure(fs: Any, url: str, error: Exception) -> Exception:
    """What to raise for an error in reading `url`."""
    if isinstance(error, FileError | UserError):
        return error
    for kind, reason in (
        (FileNotFoundError, "no such file"),
        (PermissionError, "may not be read"),
        (IsADirectoryError, "a folder that may not be listed"),
    ):
        if isinstance(error, kind):
            return FileError(reason)
    if not is_local(fs):
        return UserError(f"{url}: {one_line(error)}; start again to go on from here")
    if isinstance(error, OSError):
        return FileError(f"unreadable: {error.strerror or one_line(error)}")
    return error


def blocks(url: str, first: int = 0, last: int | None = None) -> Iterator[bytes]:
    """The file's bytes, unpacked; of one that is not packed, those from `first` to before `last`.

    Raises:
        FileError: the file, or the rest of it, cannot be read; all that came before was given.
        UserError: its store is out of reach.
    """
    if url.endswith(".gz"):
        return _gunzip(_stored(url))
    return _unzstd(_stored(url)) if url.endswith(".zst") else _stored(url, first, last)


def read_whole(url: str, limit: int) -> bytes:
    """All bytes of a file, unpacked.

    Raises:
        FileError: it cannot be read to its end, or has more than `limit` bytes.
        UserError: its store is out of reach.
    """
    data = bytearray()
    for block in blocks(url):
        data += block
        if len(data) > limit:
            raise FileError(f"longer than {limit} bytes")
    return bytes(data)


def lines(stream: Iterable[bytes], limit: int, number: int = 1, offset: int = 0) -> Iterator[Line]:
    """The lines of `stream` that are not empty; of one beyond `limit` bytes, only its beginning.

    Args:
        number: of the first line in its file.
        offset: of its first byte.

    Raises:
        FileError: the stream did; the line that it broke off in was given.
    """
    pending = b""  # the beginning of the line that the next block goes on with
    length = 0  # of that line, also what was thrown away
    damage: FileError | None = None
    try:
        for block in stream:
            first, *others = block.split(b"\n")
            length += len(first)
            pending += first[: limit + 1 - len(pending)]
            for following in others:
                if length > limit or pending.strip():
                    yield _line(number, offset, pending, length, limit)
                number, offset = number + 1, offset + length + 1
                pending, length = following[: limit + 1], len(following)
    except FileError as error:
        damage = error
    if length > limit or pending.strip():
        yield _line(number, offset, pending, length, limit)
    if damage:
        damage.where = f", byte {offset + length} unpacked"
        raise damage


def _line(number: int, offset: int, data: bytes, length: int, limit: int) -> Line:
    is_whole = length <= limit
    return Line(number, offset, data if is_whole else data[: 4 * EXCERPT], is_whole)


def excerpt(data: bytes | str, at: int = 0) -> str:
    """Some characters of `data` near a position, that can be printed."""
    start = max(at - CONTEXT, 0)
    piece = data[start : start + EXCERPT]
    if isinstance(piece, str):
        piece = piece.encode("utf-8", "backslashreplace")
    text = piece.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else " " for c in text)


def _stored(url: str, first: int = 0, last: int | None = None) -> Iterator[bytes]:
    fs, path = file_system(url)
    left = sys.maxsize if last is None else last - first
    try:
        with fs.open(path, "rb") as file:
            file.seek(first)
            while block := file.read(min(BLOCK, left)):
                yield block
                left -= len(block)
    except Exception as error:
        raise failure(fs, url, error) from None


def _gunzip(stored: Iterable[bytes]) -> Iterator[bytes]:
    """All members of a gzip file; padding of zeros between and after them is nothing."""
    unpack = zlib.decompressobj(wbits=31)
    is_begun = False
    for block in stored:
        while block := block if is_begun else block.lstrip(b"\0"):
            is_begun = True
            try:
                data = unpack.decompress(block, UNPACKED)
            except zlib.error:
                raise FileError("damaged gzip stream") from None
            if data:
                yield data
            block = unpack.unused_data or unpack.unconsumed_tail
            if unpack.eof:
                unpack, is_begun = zlib.decompressobj(wbits=31), False
    if is_begun:
        if data := unpack.flush():
            yield data
        if not unpack.eof:
            raise FileError("gzip stream cut short")


def _unzstd(stored: Iterable[bytes]) -> Iterator[bytes]:
    raw = pa.PythonFile(_Chain(stored), "r")
    stream = pa.CompressedInputStream(raw, "zstd")
    while True:
        try:
            data = stream.read(UNPACKED)
        except (OSError, pa.ArrowException) as error:
            cut = "Truncated" in str(error)
            raise FileError("zstd stream cut short" if cut else "damaged zstd stream") from None
        if not data:
            return
        yield data


class _Chain(io.RawIOBase):
    """Blocks as a file."""

    def __init__(self, stored: Iterable[bytes]) -> None:
        self._stored = iter(stored)
        self._rest = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        self._rest = self._rest or next(self._stored, b"")
        data, self._rest = self._rest[:size], self._rest[size:]
        return data
