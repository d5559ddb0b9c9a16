"""Trees of text: a file is a document; .txt, .md and .rst, or whatever suffixes are given."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from qwen2.corpus.files import Found
from qwen2.corpus.readers.base import FileReader, Split
from qwen2.corpus.readers.places import Place
from qwen2.corpus.readers.streams import read_whole


class TextSource(FileReader):
    """Text files below folders, as they are."""

    format: Literal["text"]
    suffixes: tuple[str, ...] = Field(default=(".txt", ".md", ".rst"), min_length=1)
    """Of files below a folder, without .gz or .zst."""

    @property
    def _suffixes(self) -> tuple[str, ...]:
        return tuple(suffix.lower() for suffix in self.suffixes)

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        text = read_text(self, place)
        yield self.document(place, text) if isinstance(text, str) else text


def read_text(source: FileReader, place: Place) -> Found | str:
    """The text of a UTF-8 file with Unix line ends, or why it is none.

    Raises:
        FileError: the file cannot be read, or is longer than `max_bytes`.
    """
    data = read_whole(place.url, source.max_bytes)
    if b"\0" in data:
        return source.skipped(place, "text holds NUL", f", byte {data.index(0)}", data)
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        return source.skipped(place, "not UTF-8", f", byte {error.start}", data, error.start)
