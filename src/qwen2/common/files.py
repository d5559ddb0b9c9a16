"""Durable files: whatever has its final name is complete and its bytes are known.

A file or folder is written under a temporary name beside its target, flushed to the disk, and
renamed. A folder carries `manifest.json` with the size and sha256 of every file, so that a reader
can verify it and name what is wrong.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qwen2.common.errors import UserError

MANIFEST = "manifest.json"

Entry = dict[str, Any]
"""What a manifest says of a file: `bytes` and `sha256`."""


def durable_write(path: Path, data: bytes) -> None:
    """Replace the file at `path` by `data`: it has the old bytes or the new, never a mix.

    Raises:
        UserError: the disk is full or the place cannot be written.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with plain_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        fsync(path.parent)


@contextmanager
def durable_file(target: Path) -> Iterator[Path]:
    """A temporary file that becomes `target` when the block ends well, and else goes.

    Raises:
        UserError: `target` exists, or the disk is full.
    """
    if target.exists():
        raise UserError(f"{target}: exists already; choose another place or remove it")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with plain_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            fsync(partial)
            partial.rename(target)
        finally:
            partial.unlink(missing_ok=True)
        fsync(target.parent)


@contextmanager
def durable_folder(
    target: Path, *, overwrite: bool = False, known: Mapping[str, Entry] | None = None
) -> Iterator[Path]:
    """A temporary folder that becomes `target`, with a manifest, when the block ends well.

    When the block raises, the temporary folder is removed and `target` is as it was. `known`, which
    may be filled in the block, is of files that others have flushed, see `write_manifest`.

    Raises:
        UserError: `target` exists and `overwrite` is false, or the disk is full.
    """
    if target.exists() and not overwrite:
        raise UserError(f"{target}: exists already; choose another place or remove it")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    retired = target.with_name(f".{target.name}.{os.getpid()}.retired")
    with plain_errors(target):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
            yield partial
            write_manifest(partial, known or {})
            if target.exists():
                target.rename(retired)
            partial.rename(target)
            fsync(target.parent)
        except BaseException:
            if retired.exists() and not target.exists():
                retired.rename(target)
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(retired, ignore_errors=True)


def write_manifest(folder: Path, known: Mapping[str, Entry]) -> None:
    """Flush every file below `folder` and record sizes and sha256 in its manifest.

    `known` has the entries of files that another process wrote, flushed and read for them.

    Raises:
        UserError: one of these is not there.
    """
    names = [
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MANIFEST
    ]
    if unseen := known.keys() - set(names):
        raise UserError(
            f"{folder}: another process wrote {min(unseen)}, which is not there; all of them must "
            "see the same file system"
        )
    entries = {name: known.get(name) or flushed_entry(folder / name) for name in sorted(names)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"files": entries}, indent=1))
    fsync(manifest)
    for path in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        fsync(path)


def flushed_entry(path: Path) -> Entry:
    """What a manifest says of the file at `path`, whose bytes are on the disk then."""
    fsync(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def verify_folder(folder: Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Check `folder` against its manifest: None when whole, else what is wrong, in one line.

    share: (i, n) checks the i-th of n shares of about as many bytes.
    """
    manifest = folder / MANIFEST
    try:
        files: dict[str, Entry] = json.loads(manifest.read_text())["files"]
        entries = [(name, int(e["bytes"]), str(e["sha256"])) for name, e in files.items()]
    except FileNotFoundError:
        return f"{folder}: no {MANIFEST}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest}: not readable"
    number, count = share
    for name, size, sha256 in sorted(entries, key=lambda entry: entry[1])[number::count]:
        path = folder / name
        try:
            if not path.is_file():
                return f"{path}: missing"
            if path.stat().st_size != size:
                return f"{path}: {path.stat().st_size} bytes, {size} expected"
            if sha256_of(path) != sha256:
                return f"{path}: its sha256 is not the manifest's"
        except OSError as error:
            return f"{path}: {error.strerror}"
    return None


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, its line ends as they are.

    Raises:
        UserError: it is not there, not readable, or not UTF-8.
    """
    try:
        return path.read_bytes().decode()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from None


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left half-written in `folder`; mend a half-done replacement."""
    for path in folder.glob(".*.retired"):
        target = folder / path.name[1:].rsplit(".", 2)[0]
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.rename(target)
    for path in folder.glob(".*.partial"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove `folder`: it has all its files until its name is gone, also if the process is killed.

    Raises:
        UserError: it may not be removed, or the disk fails.
    """
    gone = folder.with_name(f".{folder.name}.{os.getpid()}.partial")  # removed by the next start
    with plain_errors(folder):
        folder.rename(gone)
        shutil.rmtree(gone)


def fsync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on the disk before anything else is done."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def plain_errors(target: Path) -> Iterator[None]:
    """Errors in writing `target` in one line: a full or failing disk, a place that is not ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"{target}: the disk is full; nothing was changed") from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.EIO):
            raise UserError(f"{target}: cannot be written: {error.strerror}") from error
        raise
