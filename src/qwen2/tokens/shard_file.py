"""One shard: documents as token ids in a file, and what is known of each in another beside it.

    shard-00000.safetensors
        tokens    (tokens,)       uint16 when the vocabulary fits into it, else uint32
        offsets   (documents+1,)  int64; document i is tokens[offsets[i]:offsets[i+1]]
        kinds     (documents,)    uint16 index into the list of kinds
        metadata  vocab_size, end_of_text, tokenizer, kinds
    shard-00000.documents.parquet
        a row a document: kind, id, source, language, part, row
        metadata  counts, and size and sha256 of the shard

Every document ends with `<|endoftext|>`. Both files are a pure function of what is written, so any
number of processes can write shards, one a part of the corpus, in any order. The second file is
written last: where it is, the shard is whole.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError, safe_open

from qwen2.common.config import Config, one_line
from qwen2.common.errors import UserError
from qwen2.common.files import durable_file, sha256_of

Ids = Sequence[int] | NDArray[Any]

NOTES = b"qwen2.shard"  # key of the Parquet file's metadata
GROUP = 4096  # documents that are read together when one's origin is asked for
SCHEMA = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("source", pa.string()),
        pa.field("language", pa.string()),
        pa.field("part", pa.string()),
        pa.field("row", pa.int32()),
    ]
)


class Origin(NamedTuple):
    """Where a document comes from."""

    id: str
    source: str
    language: str | None = None
    part: str | None = None
    """The part of the corpus run that has it, and the decisions of filters about it."""
    row: int | None = None
    """Its row there."""


class Encoded(NamedTuple):
    """A document as token ids, without `<|endoftext|>`."""

    kind: str
    ids: Ids
    origin: Origin | None = None


class ShardNotes(Config):
    """What the Parquet file says of the shard beside it."""

    vocab_size: int
    end_of_text: int
    tokenizer: str
    kinds: list[str]
    documents_by_kind: dict[str, int]
    tokens_by_kind: dict[str, int]
    bytes: int
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class OpenShard(NamedTuple):
    """A shard's arrays, mapped: pages are read when they are touched."""

    tokens: NDArray[Any]
    offsets: NDArray[np.int64]
    kinds: NDArray[np.uint16]


def documents_path(shard: Path) -> Path:
    """The file beside `shard` that tells of its documents."""
    return shard.with_suffix(".documents.parquet")


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """What ids are stored as: half the memory where they fit."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def write_shard(
    path: Path,
    documents: Iterable[Encoded],
    *,
    kinds: Sequence[str],
    vocab_size: int,
    end_of_text: int,
    tokenizer: str,
) -> ShardNotes:
    """Write `documents` in their order as the shard `path`, durably; there may be none.

    What a process that was killed left half-done is written again.

    Args:
        kinds: all kinds there are; the same, or a longer list that begins so, in every shard of a
            folder.
        end_of_text: id of `<|endoftext|>`, which is appended to every document.
        tokenizer: fingerprint of the tokenizer that made the ids.

    Raises:
        UserError: the shard exists, a kind is not listed, an id is outside the vocabulary, or the
            disk is full.
    """
    assert 0 <= end_of_text < vocab_size, f"end of text {end_of_text}, vocabulary {vocab_size}"
    documents = list(documents)
    number = {kind: index for index, kind in enumerate(kinds)}
    for document in documents:
        if document.kind not in number:
            raise UserError(f"{path}: kind {document.kind!r} is not one of {', '.join(kinds)}")
    lengths = np.array([len(document.ids) + 1 for document in documents], np.int64)
    arrays: dict[str, NDArray[Any]] = {  # widest first, so that each is aligned
        "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        "tokens": _joined(documents, vocab_size, end_of_text),
        "kinds": np.array([number[document.kind] for document in documents], np.uint16),
    }
    metadata = {
        "format": "qwen2-shard",
        "vocab_size": str(vocab_size),
        "end_of_text": str(end_of_text),
        "tokenizer": tokenizer,
        "kinds": json.dumps(list(kinds)),
    }
    if not documents_path(path).exists():
        path.unlink(missing_ok=True)
    with durable_file(path) as partial:
        _save(partial, arrays, metadata)
    tokens_by_kind: Counter[str] = Counter()
    for document, length in zip(documents, lengths.tolist(), strict=True):
        tokens_by_kind[document.kind] += length
    notes = ShardNotes(
        vocab_size=vocab_size,
        end_of_text=end_of_text,
        tokenizer=tokenizer,
        kinds=list(kinds),
        documents_by_kind=dict(Counter(document.kind for document in documents)),
        tokens_by_kind=dict(tokens_by_kind),
        bytes=path.stat().st_size,
        sha256=sha256_of(path),
    )
    _write_origins(documents_path(path), documents, notes)
    return notes


def open_shard(path: Path, vocab_size: int, tokenizer: str, index: str) -> OpenShard:
    """Map a shard and check that it is whole, and as the file called `index` says.

    Raises:
        UserError: it is missing, damaged or foreign.
    """
    try:
        # Through torch, because numpy's reader copies: this one maps the file and pages on demand.
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tokens, offsets, kinds = (
                file.get_tensor(name).numpy() for name in ("tokens", "offsets", "kinds")
            )
    except FileNotFoundError:
        raise UserError(f"{path}: missing; make the shards again") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged: {one_line(error)}; make the shards again") from None
    if metadata.get("tokenizer") != tokenizer:
        raise UserError(f"{path}: made with another tokenizer than {index} says")
    if tokens.dtype != token_dtype(vocab_size) or metadata.get("vocab_size") != str(vocab_size):
        raise UserError(f"{path}: made for another vocabulary than {index} says")
    tokens.flags.writeable = False
    return OpenShard(tokens, offsets, kinds)


def read_notes(shard: Path) -> ShardNotes:
    """What is noted of `shard`.

    Raises:
        UserError: its Parquet file is missing, damaged or foreign.
    """
    path = documents_path(shard)
    notes = (open_origins(shard).schema_arrow.metadata or {}).get(NOTES)
    if notes is None:
        raise UserError(f"{path}: not written with a shard; make the shards again")
    return ShardNotes.parse(json.loads(notes), str(path))


def open_origins(shard: Path) -> pq.ParquetFile:
    """The Parquet file of `shard`, mapped.

    Raises:
        UserError: it is missing or damaged.
    """
    path = documents_path(shard)
    try:
        return pq.ParquetFile(path, memory_map=True)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; make the shards again") from None
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged: {one_line(error)}; make the shards again") from None


def _joined(documents: Sequence[Encoded], vocab_size: int, end_of_text: int) -> NDArray[Any]:
    """(tokens,) the ids of all documents, each with its end."""
    end = np.array([end_of_text], np.uint32)
    parts: list[NDArray[Any]] = [np.empty(0, np.uint32)]
    for document in documents:
        # An empty list would be of floats.
        parts += (np.asarray(document.ids), end) if len(document.ids) else (end,)
    flat = np.concatenate(parts)
    if len(flat):
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{vocab_size}; give the vocabulary size of the tokenizer that made it"
            )
    return flat.astype(token_dtype(vocab_size), copy=False)


def _save(path: Path, arrays: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; the library's own writer gives the metadata a random order."""
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": {"i": "I", "u": "U"}[array.dtype.kind] + str(8 * array.itemsize),
            "shape": array.shape,
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(np.ascontiguousarray(array).data)


def _write_origins(path: Path, documents: Sequence[Encoded], notes: ShardNotes) -> None:
    rows = [document.origin or (None,) * len(Origin._fields) for document in documents]
    columns = [[document.kind for document in documents], *map(list, zip(*rows, strict=True))]
    columns += [[]] * (len(SCHEMA) - len(columns))  # where there are no documents
    arrays = [pa.array(c, field.type) for c, field in zip(columns, SCHEMA, strict=True)]
    schema = SCHEMA.with_metadata({NOTES: notes.model_dump_json()})
    with durable_file(path) as partial:
        table = pa.Table.from_arrays(arrays, schema=schema)
        pq.write_table(table, partial, row_group_size=GROUP, compression="zstd")
