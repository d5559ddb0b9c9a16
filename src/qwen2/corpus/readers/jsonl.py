"""JSON Lines: one object a line; .jsonl, .ndjson or .json, plain, .gz or .zst.

A line that is no object, or whose text is none, is skipped with its number and byte. Files are read
in blocks, and of a line longer than `max_bytes` only the beginning is held. A large file on a disk
that is not packed is cut into ranges of lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from qwen2.corpus.files import Found, Skipped
from qwen2.corpus.readers.base import Range, Split
from qwen2.corpus.readers.places import Place, file_system, is_local
from qwen2.corpus.readers.records import RecordReader, plain
from qwen2.corpus.readers.streams import PACKED, FileError, Line, blocks, lines

SUSPICIOUS = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")  # spells a surrogate or NUL
BOM = b"\xef\xbb\xbf"


class JsonlSource(RecordReader):
    """Files of JSON Lines."""

    format: Literal["jsonl"]

    SUFFIXES: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json")

    def _cut(self, place: Place, most: int) -> list[Range]:
        return line_ranges(place, most)

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        return read_jsonl(self, place, split)


def line_ranges(place: Place, most: int) -> list[Range]:
    """The file as ranges of whole lines of `most` bytes and one line more; none if it is packed.

    All of it is read, to count the lines; so files that are not on a disk are not cut.
    """
    if place.url.endswith(PACKED) or not is_local(file_system(place.url)[0]):
        return []
    starts = [(0, 0)]  # byte and line of each range
    at = counted = 0  # bytes before the block, lines before what follows in it
    try:
        for block in blocks(place.url):
            low = 0
            while (due := starts[-1][0] + most - 1 - at) < len(block):
                end = block.find(b"\n", max(due, low))
                if end < 0:
                    break
                counted += block.count(b"\n", low, end + 1)
                low = end + 1
                starts.append((at + low, counted))
            counted += block.count(b"\n", low)
            at += len(block)
    except FileError:
        return []  # who reads it will say what is wrong
    ends = [*(start for start, _ in starts[1:]), at]
    return [
        Range(first=first, last=last, records=before)
        for (first, before), last in zip(starts, ends, strict=True)
        if first < last
    ]


def read_jsonl(source: RecordReader, place: Place, split: Split) -> Iterator[Found]:
    """The documents of one file of `source`; a record's number is that of its line."""
    seen: set[bytes] = set()
    part = split.range
    first, last, before = (part.first, part.last, part.records) if part else (0, None, 0)
    stored = blocks(place.url, first, last)
    for line in lines(stored, source.max_bytes, before + 1, first):
        where = f", line {line.number}, byte {line.offset}"
        record = _parse(source, place, line, where)
        if isinstance(record, Skipped):
            yield record
        else:
            yield source.record(place, record, line.number, where, seen)


def _parse(source: RecordReader, place: Place, line: Line, where: str) -> dict[str, Any] | Skipped:
    if not line.is_whole:
        reason = f"longer than {source.max_bytes} bytes"
        return source.skipped(place, reason, where, line.data)
    data = line.data.removeprefix(BOM) if line.number == 1 else line.data
    try:
        record = json.loads(data.decode())
    except UnicodeDecodeError as error:
        return source.skipped(place, "not UTF-8", where, data, error.start)
    except json.JSONDecodeError as error:
        at = len(error.doc[: error.pos].encode())
        return source.skipped(place, "not JSON", where, data, at)
    except (ValueError, RecursionError):  # an integer of too many digits; nested too deep
        return source.skipped(place, "JSON beyond Python's limits", where, data)
    if not isinstance(record, dict):
        return source.skipped(place, "not a JSON object", where, data)
    if b"\\u" in data and SUSPICIOUS.search(data):
        text = source.fields.text
        return {name: value if name == text else plain(value) for name, value in record.items()}
    return record
