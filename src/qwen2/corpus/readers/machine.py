"""The text that every machine with Python has, as a source: a corpus with no network."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from qwen2.corpus.files import MAX_BYTES, Found, Skipped
from qwen2.corpus.machine import SOURCES, this_machine
from qwen2.corpus.readers.base import Reader, Split
from qwen2.corpus.readers.places import Place, printable


class MachineSource(Reader):
    """One kind of this machine's text; `limit` says how much of it."""

    format: Literal["machine"]
    kind: Literal["code", "docstrings", "reference", "prose", "multilingual"]
    max_bytes: int = Field(default=MAX_BYTES, gt=0)

    def splits(self) -> list[Split]:
        return [Split(source=self.name, number=0, files=(Place(self.kind, self.kind, 0),))]

    def _found(self, split: Split) -> Iterator[Found]:
        for found in SOURCES[self.kind](this_machine()):
            if isinstance(found, Skipped):
                yield dataclasses.replace(found, source=printable(found.source))
                continue
            name = printable(found.id.removeprefix(f"{self.kind}/"))
            place = Place(name, printable(found.source), 0)
            yield self.document(
                place,
                found.text,
                language=found.language,
                licence=found.licence,
                group=found.group,
                metadata=found.metadata,
            )
