"""What the tests of readers share."""

import itertools
from typing import Any

from pydantic import TypeAdapter

from qwen2.corpus import Document
from qwen2.corpus.files import Skipped
from qwen2.corpus.readers import Reader, Source

SOURCE: TypeAdapter[Any] = TypeAdapter(Source)


def source(format: str, *paths: object, **settings: Any) -> Any:
    values = {"name": "s", "kind": "web", "format": format, **settings}
    return SOURCE.validate_python({**values, "paths": [str(path) for path in paths]})


def everything(reader: Reader) -> list[Document | Skipped]:
    """All that a source gives; also holds that ids are unique and that reading goes on anywhere."""
    found: list[Document | Skipped] = []
    for split in reader.splits():
        again = type(split).parse(split.model_dump(mode="json"))
        things = list(reader.read(again))
        for done in {0, 1, len(things) // 2, len(things)}:
            assert list(itertools.islice(reader.read(split), done, None)) == things[done:]
        found += things
    ids = [thing.id for thing in found if isinstance(thing, Document)]
    assert len(ids) == len(set(ids))
    return found


def read(reader: Reader) -> tuple[list[Document], list[Skipped]]:
    found = everything(reader)
    return (
        [thing for thing in found if isinstance(thing, Document)],
        [thing for thing in found if isinstance(thing, Skipped)],
    )
