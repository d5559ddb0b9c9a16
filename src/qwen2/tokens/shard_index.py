"""The index of a folder of shards: what is in it, and the checksums of its files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from qwen2.common.config import Config, one_line
from qwen2.common.errors import UserError
from qwen2.common.files import MANIFEST, durable_write, sha256_of
from qwen2.tokens.shard_file import ShardNotes, documents_path, read_notes

INDEX = "shards.json"


class ShardEntry(Config):
    """One file of the folder."""

    name: Annotated[str, Field(pattern=r"^shard-\d{5}(-\d{5})?\.safetensors$")]
    documents: int
    tokens: int


class ShardIndex(Config):
    """What shards.json says of the folder."""

    vocab_size: int
    end_of_text: int
    tokenizer: str
    kinds: list[str]
    documents_by_kind: dict[str, int]
    tokens_by_kind: dict[str, int]
    shards: list[ShardEntry]


def index_shards(folder: Path, names: Sequence[str]) -> ShardIndex:
    """Make a folder of the shards `names` in it, which any processes have written; any number of
    times with the same result.

    Tokens are not read: their checksums were noted when they were written.

    Raises:
        UserError: a shard is missing, they do not fit each other, or they hold no documents.
    """
    notes = {name: read_notes(folder / name) for name in names}
    if not any(note.documents_by_kind for note in notes.values()):
        raise UserError(f"{folder}: no documents in its shards; is the corpus empty?")
    first = max(notes.values(), key=lambda note: len(note.kinds))
    documents, tokens = Counter[str](), Counter[str]()
    files: dict[str, dict[str, Any]] = {}
    for name, note in notes.items():
        _check_notes(folder / name, note, first)
        documents.update(note.documents_by_kind)
        tokens.update(note.tokens_by_kind)
        files[name] = {"bytes": note.bytes, "sha256": note.sha256}
    index = ShardIndex(
        vocab_size=first.vocab_size,
        end_of_text=first.end_of_text,
        tokenizer=first.tokenizer,
        kinds=first.kinds,
        documents_by_kind={kind: documents[kind] for kind in first.kinds},
        tokens_by_kind={kind: tokens[kind] for kind in first.kinds},
        shards=[
            ShardEntry(
                name=name,
                documents=sum(note.documents_by_kind.values()),
                tokens=sum(note.tokens_by_kind.values()),
            )
            for name, note in notes.items()
        ],
    )
    durable_write(folder / INDEX, (json.dumps(index.model_dump(), indent=1) + "\n").encode())
    for path in (folder / INDEX, *(documents_path(folder / name) for name in names)):
        files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    manifest = {"files": {name: files[name] for name in sorted(files)}}
    durable_write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return index


def read_index(folder: Path) -> ShardIndex:
    """What shards.json in `folder` says.

    Raises:
        UserError: it is not there or cannot be that.
    """
    path = folder / INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {INDEX}; not a folder of shards") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable: {one_line(error)}") from None
    return ShardIndex.parse(values, str(path))


def _check_notes(path: Path, note: ShardNotes, first: ShardNotes) -> None:
    for name in ("vocab_size", "end_of_text", "tokenizer"):
        if (here := getattr(note, name)) != (there := getattr(first, name)):
            raise UserError(f"{path}: made with {name} {here}, others with {there}")
    if note.kinds != first.kinds[: len(note.kinds)]:
        raise UserError(f"{path}: made with kinds {note.kinds}, others with {first.kinds}")
    if not path.is_file() or path.stat().st_size != note.bytes:
        raise UserError(f"{path}: missing or cut short; remove {documents_path(path)}, write again")
