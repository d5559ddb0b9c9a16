"""Shards: documents as token ids on disk, memory-mapped when read.

A folder of shards is durable (manifest with sha256) and holds

    shards.json            vocabulary size, tokenizer fingerprint, kinds, the list of shards
    shard-00000.safetensors
        tokens    (tokens,)       uint16 when the vocabulary fits into it, else uint32
        offsets   (documents+1,)  int64; document i is tokens[offsets[i]:offsets[i+1]]
        kinds     (documents,)    uint16 index into the list of kinds
        metadata  vocab_size, end_of_text, tokenizer, kinds

Every document ends with `<|endoftext|>`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qwen2.common.config import Config, one_line
from qwen2.common.errors import UserError
from qwen2.common.files import MANIFEST, durable_folder, sha256_of, verify_folder
from qwen2.corpus.documents import Document

INDEX = "shards.json"
SHARD_TOKENS = 1 << 26  # 128 MiB of uint16
BATCH_BYTES = 1 << 22  # of text handed to the tokenizer at once: enough to keep all cores busy

Ids = Sequence[int] | NDArray[Any]


class ShardEntry(Config):
    """One file of the folder."""

    name: Annotated[str, Field(pattern=r"^shard-\d{5}\.safetensors$")]
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


def tokenize_documents(
    documents: Iterable[Document], encode_batch: Callable[[list[str]], Sequence[Ids]]
) -> Iterator[tuple[str, Ids]]:
    """(kind, token ids) of each document, in order; `encode_batch` is called on a few MB at a time.

    `encode_batch` must not read control tokens out of text: a document that speaks of
    `<|endoftext|>` does not end there.
    """
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield from _encode(batch, encode_batch)
            batch, size = [], 0
    yield from _encode(batch, encode_batch)


def write_shards(
    folder: Path,
    documents: Iterable[tuple[str, Ids]],
    *,
    vocab_size: int,
    end_of_text: int,
    tokenizer: str,
    shard_tokens: int = SHARD_TOKENS,
) -> ShardIndex:
    """Write (kind, token ids) pairs as shards into a new durable folder, in their order.

    Args:
        documents: token ids without `<|endoftext|>`, which is appended here.
        end_of_text: its id.
        tokenizer: fingerprint of the tokenizer that made the ids.
        shard_tokens: cap of a shard; a longer document has a shard of its own.

    Raises:
        UserError: the folder exists, there are no documents, an id is outside the vocabulary, or
            the disk is full.
    """
    assert 0 <= end_of_text < vocab_size, f"end of text {end_of_text}, vocabulary {vocab_size}"
    with durable_folder(folder) as partial:
        writer = _Writer(partial, vocab_size, end_of_text, tokenizer)
        for kind, ids in documents:
            if writer.tokens and writer.tokens + len(ids) + 1 > shard_tokens:
                writer.flush()
            writer.add(kind, ids)
        if writer.tokens:
            writer.flush()
        if not writer.entries:
            raise UserError(f"{folder}: no documents to write; is the corpus empty?")
        index = writer.index()
        (partial / INDEX).write_text(json.dumps(index.model_dump(), indent=1) + "\n")
    return index


class Shards:
    """Documents of token ids in a folder of shards, as one memory-mapped sequence.

    Opening checks that every shard is there, whole by its own header, and as the index says;
    `verify()` reads all the bytes.

    Raises:
        UserError: no such folder, or something in it is missing, damaged or foreign.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _read_index(folder)
        self._tokens: list[NDArray[Any]] = []
        self._offsets: list[NDArray[np.int64]] = []
        self._kinds: list[NDArray[np.uint16]] = []
        for entry in self.index.shards:
            tokens, offsets, kinds = _open_shard(folder / entry.name, entry, self.index)
            self._tokens.append(tokens)
            self._offsets.append(offsets)
            self._kinds.append(kinds)
        self.lengths: NDArray[np.int64] = np.concatenate([np.diff(o) for o in self._offsets])
        """(documents,) tokens of each document, `<|endoftext|>` included."""
        self.tokens = int(self.lengths.sum())
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder}: no {MANIFEST}; make the shards again")
        self.fingerprint = sha256_of(folder / MANIFEST)
        """Changes with any byte of the shards."""
        self._first = np.cumsum([0, *(len(o) - 1 for o in self._offsets)])

    def __len__(self) -> int:
        """Documents."""
        return len(self.lengths)

    def document(self, number: int) -> NDArray[Any]:
        """(length,) token ids of a document with its `<|endoftext|>`: a read-only view."""
        shard, local = self._locate(number)
        start, stop = self._offsets[shard][local : local + 2]
        return self._tokens[shard][start:stop]

    @property
    def kinds(self) -> NDArray[np.uint16]:
        """(documents,) the kind of each, as an index into `index.kinds`."""
        return np.concatenate(self._kinds)

    def kind(self, number: int) -> str:
        """The kind of a document."""
        shard, local = self._locate(number)
        return self.index.kinds[int(self._kinds[shard][local])]

    def verify(self) -> None:
        """Read everything: checksums, and that ids lie inside the vocabulary.

        Raises:
            UserError: names the file and what is wrong with it.
        """
        if problem := verify_folder(self.folder):
            raise UserError(f"{problem}; make the shards again")
        for entry, tokens in zip(self.index.shards, self._tokens, strict=True):
            if int(tokens.max()) >= self.index.vocab_size:
                raise UserError(f"{self.folder / entry.name}: token id {tokens.max()} too large")

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return shard, number - int(self._first[shard])


class _Writer:
    """Gathers documents and writes them out as one shard at each flush."""

    def __init__(self, folder: Path, vocab_size: int, end_of_text: int, tokenizer: str) -> None:
        self.folder = folder
        self.vocab_size, self.end_of_text, self.tokenizer = vocab_size, end_of_text, tokenizer
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.entries: list[ShardEntry] = []
        self.kinds: dict[str, int] = {}
        self.documents_by_kind: Counter[str] = Counter()
        self.tokens_by_kind: Counter[str] = Counter()
        self._start()

    def _start(self) -> None:
        self.tokens = 0
        self.parts: list[NDArray[Any]] = []
        self.part_kinds: list[int] = []

    def add(self, kind: str, ids: Ids) -> None:
        array = np.append(np.asarray(ids, dtype=np.int64), self.end_of_text)
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocab_size:
            raise UserError(
                f"token id {low if low < 0 else high} is outside the vocabulary of "
                f"{self.vocab_size}; give the vocabulary size of the tokenizer that made it"
            )
        self.parts.append(array.astype(self.dtype))
        self.part_kinds.append(self.kinds.setdefault(kind, len(self.kinds)))
        self.tokens += len(array)
        self.documents_by_kind[kind] += 1
        self.tokens_by_kind[kind] += len(array)

    def flush(self) -> None:
        name = f"shard-{len(self.entries):05d}.safetensors"
        tensors = {
            "tokens": np.concatenate(self.parts),
            "offsets": np.cumsum([0, *map(len, self.parts)], dtype=np.int64),
            "kinds": np.array(self.part_kinds, dtype=np.uint16),
        }
        metadata = {
            "format": "qwen2-shard",
            "vocab_size": str(self.vocab_size),
            "end_of_text": str(self.end_of_text),
            "tokenizer": self.tokenizer,
            "kinds": json.dumps(list(self.kinds)),
        }
        save_file(tensors, self.folder / name, metadata)
        self.entries.append(ShardEntry(name=name, documents=len(self.parts), tokens=self.tokens))
        self._start()

    def index(self) -> ShardIndex:
        return ShardIndex(
            vocab_size=self.vocab_size,
            end_of_text=self.end_of_text,
            tokenizer=self.tokenizer,
            kinds=list(self.kinds),
            documents_by_kind=dict(self.documents_by_kind),
            tokens_by_kind=dict(self.tokens_by_kind),
            shards=self.entries,
        )


def _encode(
    batch: list[Document], encode_batch: Callable[[list[str]], Sequence[Ids]]
) -> Iterator[tuple[str, Ids]]:
    if batch:
        encoded = encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            yield document.kind, ids


def _read_index(folder: Path) -> ShardIndex:
    path = folder / INDEX
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder}: no {INDEX}; not a folder of shards") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable: {one_line(error)}") from None
    return ShardIndex.parse(values, str(path))


def _open_shard(
    path: Path, entry: ShardEntry, index: ShardIndex
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.uint16]]:
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
    expected = np.uint16 if index.vocab_size <= 1 << 16 else np.uint32
    if metadata.get("tokenizer") != index.tokenizer:
        raise UserError(f"{path}: made with another tokenizer than {INDEX} says")
    if tokens.dtype != expected or metadata.get("vocab_size") != str(index.vocab_size):
        raise UserError(f"{path}: made for another vocabulary than {INDEX} says")
    whole = (
        len(offsets) == entry.documents + 1
        and len(kinds) == entry.documents
        and len(tokens) == entry.tokens == offsets[-1]
        and offsets[0] == 0
        and bool((np.diff(offsets) > 0).all())
        and int(kinds.max()) < len(index.kinds)
    )
    if not whole:
        raise UserError(f"{path}: its documents are not as {INDEX} says; make the shards again")
    tokens.flags.writeable = False
    return tokens, offsets, kinds
