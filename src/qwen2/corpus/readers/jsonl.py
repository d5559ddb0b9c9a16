"""JSON Lines: one object a line; .jsonl, .ndjson or .json, plain, .gz or .zst.

A line that is no object, or whose text is none, is skipped with its number and byte. Files are read
in blocks, and of a line longer than `max_bytes` only the beginning is held.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from qwen2.corpus.files import Found, Skipped
from qwen2.corpus.readers.base import Split
from qwen2.corpus.readers.places import Place
from qwen2.corpus.readers.records import RecordReader, plain
from qwen2.corpus.readers.streams import Line, blocks, lines

SUSPICIOUS = re.compile(rb"\\u(?:[dD][89a-fA-F]|0000)")  # spells a surrogate or NUL
BOM = b"\xef\xbb\xbf"


class JsonlSource(RecordReader):
    """Files of JSON Lines."""

    format: Literal["jsonl"]

    SUFFIXES: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json")

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        return read_jsonl(self, place)


def read_jsonl(source: RecordReader, place: Place) -> Iterator[Found]:
    """The documents of one file of `source`; a record's number is that of its line."""
    seen: set[bytes] = set()
    for line in lines(blocks(place.url), source.max_bytes):
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
