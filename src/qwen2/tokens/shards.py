"""Shards: a folder of documents as token ids, memory-mapped when read.

shards.json      vocabulary size, tokenizer fingerprint, kinds, the list of shards
manifest.json    size and sha256 of every file
shard-*          see shard_file.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qwen2.common.errors import UserError
from qwen2.common.files import MANIFEST, durable_folder, sha256_of, verify_folder
from qwen2.tokens.shard_file import (
    GROUP,
    Encoded,
    Ids,
    OpenShard,
    Origin,
    documents_path,
    open_origins,
    open_shard,
    read_notes,
    write_shard,
)
from qwen2.tokens.shard_index import INDEX, ShardIndex, index_shards, read_index

SHARD_TOKENS = 1 << 26  # 128 MiB of uint16
MAPPED = 4096
"""Shards that are mapped at the same time; Linux allows a process 65,530 maps."""


def write_shards(
    folder: Path,
    documents: Iterable[tuple[str, Ids] | Encoded],
    *,
    vocab_size: int,
    end_of_text: int,
    tokenizer: str,
    shard_tokens: int = SHARD_TOKENS,
) -> ShardIndex:
    """Write documents as shards into a new durable folder, in their order, by this process alone.

    Args:
        documents: `Encoded`, or the kind and the token ids alone.
        shard_tokens: cap of a shard; a longer document has a shard of its own.

    Raises:
        UserError: the folder exists, there are no documents, an id is outside the vocabulary, or
            the disk is full.
    """
    kinds: dict[str, None] = {}
    names: list[str] = []
    waiting: list[Encoded] = []
    size = 0

    def flush(partial: Path) -> None:
        names.append(f"shard-{len(names):05d}.safetensors")
        write_shard(
            partial / names[-1],
            waiting,
            kinds=list(kinds),
            vocab_size=vocab_size,
            end_of_text=end_of_text,
            tokenizer=tokenizer,
        )

    with durable_folder(folder) as partial:
        for document in documents:
            encoded = Encoded(*document)
            length = len(encoded.ids) + 1
            if waiting and size + length > shard_tokens:
                flush(partial)
                waiting, size = [], 0
            kinds.setdefault(encoded.kind)
            waiting.append(encoded)
            size += length
        if not waiting:
            raise UserError(f"{folder}: no documents to write; is the corpus empty?")
        flush(partial)
        return index_shards(partial, names)


class Shards:
    """Documents of token ids in a folder of shards, as one memory-mapped sequence.

    Opening checks that every shard is there, whole by its own header, and as the index says;
    `verify()` reads all the bytes. Processes may share it: a fork has the same maps, and a pickle
    opens the folder anew.

    Raises:
        UserError: no such folder, or something in it is missing, damaged or foreign.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self._mapped = lru_cache(MAPPED)(self._map)
        self._origins = lru_cache(8)(self._read_origins)
        opened = [self._mapped(shard)[1:] for shard in range(len(self.index.shards))]
        self.lengths: NDArray[np.int64] = np.concatenate([np.diff(o) for o, _ in opened])
        """(documents,) tokens of each document, `<|endoftext|>` included."""
        self.kinds: NDArray[np.uint16] = np.concatenate([kinds for _, kinds in opened])
        """(documents,) the kind of each, as an index into `index.kinds`."""
        self.tokens = int(self.lengths.sum())
        self._first = np.cumsum([0, *(entry.documents for entry in self.index.shards)])
        if not (folder / MANIFEST).is_file():
            raise UserError(f"{folder}: no {MANIFEST}; make the shards again")
        self.fingerprint = sha256_of(folder / MANIFEST)
        """Changes with any byte of the shards."""

    def __reduce__(self) -> tuple[type[Shards], tuple[Path]]:
        return Shards, (self.folder,)

    def __len__(self) -> int:
        """Documents."""
        return len(self.lengths)

    def document(self, number: int) -> NDArray[Any]:
        """(length,) token ids of a document with its `<|endoftext|>`: a read-only view."""
        shard, local = self._locate(number)
        tokens, offsets, _ = self._mapped(shard)
        start, stop = offsets[local : local + 2]
        return tokens[start:stop]

    def kind(self, number: int) -> str:
        """The kind of a document."""
        self._locate(number)
        return self.index.kinds[int(self.kinds[number])]

    def provenance(self, number: int) -> Origin | None:
        """Where a document comes from; None when it was not noted.

        Raises:
            UserError: the file that tells is missing, damaged, or of another shard.
        """
        shard, local = self._locate(number)
        group, row = divmod(local, GROUP)
        origin = Origin(*self._origins(shard, group)[row])
        return None if origin.id is None else origin

    def find(self, id_: str) -> int:
        """The number of the document with an id: reads the ids of all, some million a second.

        Raises:
            UserError: there is none.
        """
        for shard, entry in enumerate(self.index.shards):
            ids = open_origins(self.folder / entry.name).read(["id"], use_threads=False)["id"]
            if (local := ids.index(id_).as_py()) >= 0:
                return int(self._first[shard]) + local
        raise UserError(f"{self.folder}: no document with id {id_!r}")

    def verify(self) -> None:
        """Read everything: checksums, and that ids lie inside the vocabulary.

        Raises:
            UserError: names the file and what is wrong with it.
        """
        if problem := verify_folder(self.folder):
            raise UserError(f"{problem}; make the shards again")
        for shard, entry in enumerate(self.index.shards):
            tokens = self._mapped(shard).tokens
            if len(tokens) and int(tokens.max()) >= self.index.vocab_size:
                raise UserError(f"{self.folder / entry.name}: token id {tokens.max()} too large")

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        return shard, number - int(self._first[shard])

    def _map(self, shard: int) -> OpenShard:
        entry, index = self.index.shards[shard], self.index
        path = self.folder / entry.name
        opened = open_shard(path, index.vocab_size, index.tokenizer, INDEX)
        tokens, offsets, kinds = opened
        whole = (
            len(offsets) == entry.documents + 1
            and len(kinds) == entry.documents
            and len(tokens) == entry.tokens == offsets[-1]
            and offsets[0] == 0
            and bool((np.diff(offsets) > 0).all())
            and bool((kinds < len(index.kinds)).all())
        )
        if not whole:
            raise UserError(f"{path}: its documents are not as {INDEX} says; make the shards again")
        return opened

    def _read_origins(self, shard: int, group: int) -> list[tuple[Any, ...]]:
        """(id, source, ...) of each document of a group, as `Origin` has them."""
        entry = self.index.shards[shard]
        file: pq.ParquetFile = open_origins(self.folder / entry.name)
        files = json.loads((self.folder / MANIFEST).read_text())["files"]
        noted = read_notes(self.folder / entry.name).sha256
        if file.metadata.num_rows != entry.documents or noted != files[entry.name]["sha256"]:
            path = documents_path(self.folder / entry.name)
            raise UserError(f"{path}: of another shard; make the shards again")
        # On one thread: after a fork, Arrow's own are gone.
        table = file.read_row_group(group, list(Origin._fields), use_threads=False)
        return list(zip(*(column.to_pylist() for column in table.columns), strict=True))
