"""The real text that every machine with Python has, kind by kind.

Stands in for the report's web-scale sources (section 3.1) so that the whole system runs on real
text with no network. `readers.machine` makes it a source of a corpus.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qwen2.corpus import share, stdlib
from qwen2.corpus.documents import Document
from qwen2.corpus.files import Found


@dataclass(frozen=True)
class Places:
    """Where to look; a folder that is missing gives nothing."""

    stdlib: Path
    shares: tuple[Path, ...]


def this_machine() -> Places:
    """The standard library of this Python and the share folders of it and of the system."""
    prefixes = [sys.prefix, sys.base_prefix, "/usr/local", "/usr"]
    shares = tuple(dict.fromkeys(Path(prefix, "share").resolve() for prefix in prefixes))
    return Places(Path(sysconfig.get_path("stdlib")).resolve(), shares)


SOURCES: dict[str, Callable[[Places], Iterator[Found]]] = {
    "code": lambda places: stdlib.code(places.stdlib),
    "docstrings": lambda places: stdlib.docstrings(places.stdlib),
    "reference": lambda places: stdlib.reference(),
    "prose": lambda places: share.prose(places.shares),
    "multilingual": lambda places: share.multilingual(places.shares),
}
"""Kind -> its documents and what was skipped, in an order that depends on names only."""


def local_documents(kind: str) -> Iterator[Document]:
    """The documents of a kind on this machine as they are found, but for those that UTF-8 cannot
    hold."""
    for found in SOURCES[kind](this_machine()):
        if isinstance(found, Document) and _is_unicode(found.text):
            yield found


def _is_unicode(text: str) -> bool:
    """Whether there is no lone surrogate in it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
