"""Where files are: local paths, patterns and URLs of any file system that fsspec knows.

A path is a file, a folder (all that is below it), or a pattern: `*` and `?` stay within a name,
`**` is any number of folders, `[...]` one of some characters. `{language}` and `{group}` match a
name, or a part of one, and say what it is: `/usr/share/help/{language}/{group}` has a folder for
each language and in it one for each book. What a pattern names is taken whatever its suffix; below
a folder, a file is taken when the reader wants its name. As in a shell, hidden names only match
when they are written out.

Links to files are followed; links to folders where a path or pattern names them, never below a
folder, so that no circle is walked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from qwen2.common.config import one_line
from qwen2.common.errors import UserError

MAGIC = re.compile(r"[*?\[]|\{(?:language|group)\}")
PIECE = re.compile(r"\*|\?|\[!?\]?[^\]]*\]|\{(?:language|group)\}")
NAMED = {
    # ISO 639 with a script, a region or a variety: de, pt_BR, zh-Hans-CN, ca@valencia
    "language": r"(?P<language>[A-Za-z]{2,3}(?:[-_@][A-Za-z0-9]+)*)",
    "group": r"(?P<group>[^/.][^/]*)",
}
Captured = Mapping[str, str]


class Place(NamedTuple):
    """One file."""

    name: str
    """Relative to the folder that was named or to what stands before a pattern's first sign, so
    the same wherever the tree is mounted."""
    url: str
    size: int
    """Bytes as it is stored."""
    language: str | None = None
    """What `{language}` matched."""
    group: str | None = None


class _Entry(NamedTuple):
    path: str
    is_folder: bool
    size: int
    is_link: bool


def find_places(
    paths: Sequence[str], wanted: Callable[[str], bool], left_out: Collection[str] = ()
) -> list[Place]:
    """The files of `paths`, by name.

    Args:
        wanted: whether a file below a folder is taken, by its name without the folder.
        left_out: names of folders that are not entered.

    A folder that may not be listed is given as a place itself: who reads it will say so.

    Raises:
        UserError: a path does not exist or has no file that is wanted; two files have one name;
            the file system is unknown or out of reach.
    """
    by_name: dict[str, Place] = {}
    seen: set[str] = set()
    for path in paths:
        found = 0
        for place in _places_of(path, wanted, left_out):
            found += 1
            if place.url in seen:
                continue
            seen.add(place.url)
            other = by_name.setdefault(place.name, place)
            if other is not place:
                raise UserError(
                    f"{place.url} and {other.url} would both be called {place.name!r}; name "
                    "their common folder or a pattern below it, or make two sources of them"
                )
        if not found:
            raise UserError(f"{path}: no file of this format here; name files or suffixes")
    return [by_name[name] for name in sorted(by_name)]


def file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path in it.

    Raises:
        UserError: no such file system, or its package is not installed.
    """
    try:
        return fsspec.url_to_fs(os.path.expanduser(url))  # noqa: PTH111 (a Path would spoil URLs)
    except (ImportError, ValueError) as error:
        raise UserError(f"{url}: {one_line(error)}") from None


def is_local(fs: Any) -> bool:
    """Whether a failure of `fs` is the file's own, not a connection's."""
    return isinstance(fs, LocalFileSystem)


def _places_of(
    path: str, wanted: Callable[[str], bool], left_out: Collection[str]
) -> Iterator[Place]:
    fs, inside = file_system(path)
    *parents, last = inside.split("/")
    parts = [*parents, last] if last else parents
    fixed = next((i for i, part in enumerate(parts) if MAGIC.search(part)), len(parts))
    base = "/".join(parts[:fixed]) or "/"
    try:
        start = _entry(fs.info(base))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file or folder; correct paths") from None
    except Exception as error:  # every file system has its own way to be out of reach
        raise UserError(f"{path}: out of reach: {one_line(error)}") from None
    for entry, captured in _matching(fs, start, parts[fixed:], {}):
        below = _walk(fs, entry, left_out) if entry.is_folder else [entry]
        for file in below:
            relative = file.path.removeprefix(base).lstrip("/")
            named = file is entry or file.is_folder
            if named or wanted(relative):
                name = printable(relative or file.path.rpartition("/")[2])
                url = file.path if is_local(fs) else fs.unstrip_protocol(file.path)
                yield Place(name, printable(url), file.size, **captured)


def printable(name: str) -> str:
    """A file's name that Parquet and JSON can hold; undecodable bytes become signs like \\xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _matching(
    fs: Any, entry: _Entry, rest: Sequence[str], captured: Captured
) -> Iterator[tuple[_Entry, Captured]]:
    """What matches the components `rest` of a pattern below `entry`, and what its names caught."""
    if not rest:
        yield entry, captured
        return
    if not entry.is_folder:
        return
    first, after = rest[0], rest[1:]
    if first == "**":
        yield from _matching(fs, entry, after, captured)
        for inner in _list(fs, entry) or []:
            if inner.is_folder and not inner.is_link and not _is_hidden(inner):
                yield from _matching(fs, inner, rest, captured)
        return
    pattern = _pattern(first)
    for inner in _list(fs, entry) or []:
        match = pattern.fullmatch(inner.path.rpartition("/")[2])
        if match and (first.startswith(".") or not _is_hidden(inner)):
            yield from _matching(fs, inner, after, {**captured, **match.groupdict()})


def _pattern(component: str) -> re.Pattern[str]:
    regex, at = "", 0
    for piece in PIECE.finditer(component):
        regex += re.escape(component[at : piece.start()])
        sign, at = piece.group(), piece.end()
        if sign in "*?":
            regex += "[^/]*" if sign == "*" else "[^/]"
        elif sign[0] == "{":
            regex += NAMED[sign[1:-1]]
        else:
            inner = sign[1:-1].replace("\\", "\\\\").replace("[", "\\[")
            regex += f"[{'^' + inner[1:] if inner.startswith('!') else inner}]"
    try:
        return re.compile(regex + re.escape(component[at:]), re.DOTALL)
    except re.error as error:
        raise UserError(f"pattern {component!r}: {error}; write each name once") from None


def _walk(fs: Any, folder: _Entry, left_out: Collection[str]) -> Iterator[_Entry]:
    """The files below `folder`; and each folder that cannot be listed."""
    entries = _list(fs, folder)
    if entries is None:
        yield folder
        return
    for entry in entries:
        if _is_hidden(entry):
            continue
        if not entry.is_folder:
            yield entry
        elif not entry.is_link and entry.path.rpartition("/")[2] not in left_out:
            yield from _walk(fs, entry, left_out)


def _list(fs: Any, folder: _Entry) -> list[_Entry] | None:
    """Files and folders in `folder`, by name; None when it may not be read."""
    try:
        listed = fs.ls(folder.path, detail=True)
    except (FileNotFoundError, PermissionError, NotADirectoryError):
        return None
    except Exception as error:
        raise UserError(f"{folder.path}: out of reach: {one_line(error)}") from None
    # Sockets and pipes are "other"; object stores list a folder as an entry of itself.
    kinds = ("file", "directory", "link")
    entries = [_entry(info) for info in listed if info["type"] in kinds or info.get("islink")]
    return sorted(entry for entry in entries if entry.path != folder.path)


def _entry(info: Mapping[str, Any]) -> _Entry:
    path, link = info["name"].rstrip("/") or "/", bool(info.get("islink"))
    folder = os.path.isdir(path) if link else info["type"] == "directory"  # noqa: PTH112
    return _Entry(path, folder, info.get("size") or 0, link)


def _is_hidden(entry: _Entry) -> bool:
    return entry.path.rpartition("/")[2].startswith(".")
