"""Where records of a web archive begin and end, also behind a damage.

Each record of a .warc.gz is a gzip member of its own (one member may hold several). Behind a
damaged member reading goes on at the next one; behind a broken header, at the next line that
begins a record. A record that is cut short is never given.
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from qwen2.corpus.readers.streams import FileError

CHUNK = 1 << 14  # of stored bytes: about a record
MAGIC = b"\x1f\x8b\x08"
BEGIN = b"WARC/"
MAX_LINE = 1 << 16
MAX_HEADER = 1 << 18
LENGTH = re.compile(rb"(?im)^content-length:[ \t]*(\d{1,15})[ \t]*\r?$")
TYPE = re.compile(rb"(?im)^warc-type:[ \t]*([\w-]+)[ \t]*\r?$")
READ = (b"response", b"conversion")


class Record(NamedTuple):
    """A record's bytes, from `WARC/` to the end of its block."""

    where: str
    """Offset of its gzip member, and in the member if it is not the first there."""
    data: bytes


class Broken(NamedTuple):
    """Something that is no record."""

    where: str
    reason: str


def records(file: Any, is_packed: bool, limit: int) -> Iterator[Record | Broken]:
    """The `response` and `conversion` records of a file whose blocks have `limit` bytes or less.

    Args:
        file: seekable, at its begin.
        is_packed: whether it is gzip.
    """
    if not is_packed:
        yield from _framed(io.BufferedReader(_Plain(file), CHUNK), "", limit)
        return
    at: int | None = 0
    is_lost = False  # behind a damage, where the bytes of a member's begin may also be chance
    while at is not None:
        member = _Member(file, at)
        for found in _framed(io.BufferedReader(member, CHUNK), str(at), limit):
            is_damage = isinstance(found, Broken) and member.end is None
            if not (is_lost and is_damage and not member.given):
                yield found
        is_lost = member.end is None
        at = _next_member(file, at + 1 if member.end is None else member.end)


def _framed(stream: io.BufferedReader, member: str, limit: int) -> Iterator[Record | Broken]:
    """The records of a stream; the last thing is `Broken` when the stream is."""
    offset = 0
    is_lost = False
    where = member or "0"

    def line() -> bytes:
        nonlocal offset
        data = stream.readline(MAX_LINE)
        offset += len(data)
        return data

    try:
        while first := line():
            if not first.strip():
                continue
            start = offset - len(first)
            where = (f"{member}+{start}" if start else member) if member else str(start)
            header = bytearray(first)
            is_record = first.startswith(BEGIN)
            while is_record and header[-1:] == b"\n" and len(header) < MAX_HEADER:
                following = line()
                if not following.strip():
                    break
                header += following
            length = LENGTH.search(header)
            if not is_record or length is None:
                if not is_lost:
                    yield Broken(where, "no header of a WARC record")
                is_lost = True
                continue
            is_lost = False
            size = int(length[1])
            kind = TYPE.search(header)
            is_read = kind is not None and kind[1].lower() in READ
            if is_read and size <= limit:
                data = stream.read(size)
                if len(data) < size:
                    raise FileError("record cut short")
                yield Record(where, bytes(header) + b"\r\n" + data)
            else:
                _skip(stream, size)
                if is_read:
                    yield Broken(where, f"longer than {limit} bytes")
            offset += size
    except FileError as damage:
        yield Broken(where, damage.reason)


def _skip(stream: io.BufferedReader, size: int) -> None:
    while size:
        data = stream.read(min(size, MAX_HEADER))
        if not data:
            raise FileError("record cut short")
        size -= len(data)


class _Plain(io.RawIOBase):
    def __init__(self, file: Any) -> None:
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Member(io.RawIOBase):
    """A gzip member's bytes, unpacked; reading raises `FileError` when it breaks."""

    def __init__(self, file: Any, at: int) -> None:
        self._file = file
        self._file.seek(at)
        self._at = at
        self._packed = b""
        self._unpack = zlib.decompressobj(wbits=31)
        self.given = 0
        """Bytes so far."""
        self.end: int | None = None
        """Where it ends in the file, when it was read to there."""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self.end is None:
            is_end = False
            if not self._packed:
                self._packed = self._file.read(CHUNK)
                self._at += len(self._packed)
                is_end = not self._packed
            try:
                data = self._unpack.decompress(self._packed, len(buffer))
            except zlib.error:
                raise FileError("damaged gzip stream") from None
            self._packed = self._unpack.unconsumed_tail
            if self._unpack.eof:
                self.end = self._at - len(self._unpack.unused_data)
            elif is_end and not data:
                raise FileError("gzip stream cut short")
            if data:
                buffer[: len(data)] = data
                self.given += len(data)
                return len(data)
        return 0


def _next_member(file: Any, at: int) -> int | None:
    """Where the next gzip member begins, at `at` or later."""
    file.seek(at)
    tail = b""
    while block := file.read(CHUNK):
        found = (tail + block).find(MAGIC)
        if found >= 0:
            return at - len(tail) + found
        at += len(block)
        tail = (tail + block)[-(len(MAGIC) - 1) :]
    return None
