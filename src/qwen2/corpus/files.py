"""Finding and reading text files: what cannot be read is skipped with a reason, never fatal."""

from __future__ import annotations

import gzip
import hashlib
import os
import zlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwen2.corpus.documents import Document

MAX_BYTES = 1 << 20  # of one file, unpacked: longer ones are logs and tables more often than text


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that was found and not taken."""

    kind: str
    reason: str
    """In words that come again, so that reasons can be counted."""
    source: str
    """File or URL, and the place in it: line and byte, row, offset."""
    excerpt: str = ""
    """Some characters of what was skipped, that can be printed."""


Found = Document | Skipped


def sample_order(names: Iterable[str]) -> list[str]:
    """The names in the order of their hashes, so that any beginning is a fair sample of all."""
    return sorted(names, key=lambda name: hashlib.blake2b(name.encode(errors="replace")).digest())


def files_below(roots: Sequence[Path], left_out: Collection[str] = ()) -> dict[str, Path]:
    """Relative name -> path of every file below `roots`; the first root with a name wins.

    Symbolic links are not followed, folders called as in `left_out` not entered, and a root that
    is missing or may not be read has no files.
    """
    found: dict[str, Path] = {}
    for root in roots:
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in left_out]
            for name in files:
                path = Path(folder, name)
                if not path.is_symlink():
                    found.setdefault(path.relative_to(root).as_posix(), path)
    return found


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes | None:
    """The file's bytes, unpacked when its name ends in .gz; None when unreadable or longer."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(limit + 1)
    except (OSError, EOFError, zlib.error):
        return None
    return data if len(data) <= limit else None


def decode(data: bytes | None) -> str | None:
    """`data` as UTF-8 with Unix line ends; None when it is not strictly UTF-8 or holds NULs."""
    if data is None or b"\0" in data:
        return None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError:
        return None
