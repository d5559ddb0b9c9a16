"""Trees of text: a file is a document; .txt, .md and .rst, or whatever suffixes are given.

With a `separator` a file holds many documents, parted by lines that are the separator and nothing
else: `%` in collections of quotations (fortune), where a document is numbered from 1.
"""

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
    separator: str | None = Field(default=None, pattern=r"^\S(.*\S)?$")
    """The line between two documents of a file; None: a file is one."""

    @property
    def _suffixes(self) -> tuple[str, ...]:
        return tuple(suffix.lower() for suffix in self.suffixes)

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        text = read_text(self, place)
        if not isinstance(text, str):
            yield text
        elif self.separator is None:
            yield self.document(place, text)
        else:
            for number, piece in enumerate(_parted(text, self.separator), 1):
                if piece.strip():  # nothing stands behind the last separator
                    yield self.document(place, piece, str(number), f", text {number}")


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


def _parted(text: str, separator: str) -> Iterator[str]:
    """The texts between lines of `separator`, which may have white space at its end."""
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.rstrip() == separator:
            yield "".join(lines)
            lines = []
        else:
            lines.append(line)
    yield "".join(lines)
