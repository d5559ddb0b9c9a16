"""Trees of manual pages: .1 to .9 with any ending of the section, packed or not."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

from qwen2.corpus.files import Found
from qwen2.corpus.readers.base import FileReader, Split
from qwen2.corpus.readers.man import man_text
from qwen2.corpus.readers.places import Place
from qwen2.corpus.readers.streams import unpacked_name
from qwen2.corpus.readers.text import read_text

SECTION = re.compile(r"[^/.][^/]*\.[1-9n][A-Za-z0-9]*$")  # cut.1, SSL_read.3ssl, string.n
POINTER = re.compile(r"(?m)^\.so +(\S+)")


class ManSource(FileReader):
    """Manual pages below folders; `{language}` in a path has that of a translation's tree."""

    format: Literal["man"]

    def _wants(self, name: str) -> bool:
        return SECTION.search(unpacked_name(name)) is not None

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        roff = read_text(self, place)
        if not isinstance(roff, str):
            yield roff
            return
        text = man_text(roff)
        if not text and (pointer := POINTER.search(roff)):
            yield self.skipped(place, "points to another page", "", pointer[0])
        else:
            yield self.document(place, text)
