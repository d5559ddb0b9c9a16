"""Stage `tokens`: a shard of token ids for each part and side, and an index over them.

`shards` in the run's folder is a link to the newest: what a training recipe names as its `data` is
`shards/train`, its `tokenizer` `shards/tokenizer`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from qwen2.common.errors import UserError
from qwen2.common.files import durable_folder, sha256_of
from qwen2.corpus.documents import Document, read_documents
from qwen2.pipeline.corpus.contamination import open_tokenizer
from qwen2.pipeline.corpus.keep import SIDES
from qwen2.pipeline.corpus.layout import Layout
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.shard_file import read_notes, write_shard
from qwen2.tokens.shard_index import index_shards
from qwen2.tokens.tokenize import tokenize_documents

TOKENIZER = "tokenizer"
LINK = "shards"


def shard_path(layout: Layout, side: str, part: str) -> Path:
    """The shard of a part and side."""
    return layout.place("tokens") / side / f"shard-{part}.safetensors"


def save_tokenizer(layout: Layout) -> None:
    """Keep the tokenizer beside the shards, so that they can be read anywhere."""
    target = layout.place("tokens") / TOKENIZER
    if not target.exists():
        recipe = layout.recipe.tokens
        assert recipe is not None
        with durable_folder(target) as partial:
            open_tokenizer(recipe.tokenizer).save(partial)


def tokenize_part(layout: Layout, part: str) -> dict[str, int]:
    """Write the shards of `part`."""
    tokenizer, fingerprint = _tokenizer(layout.place("tokens") / TOKENIZER)
    encode = functools.partial(tokenizer.encode_arrays, threads=1)  # a process for each core
    kinds = list(dict.fromkeys(source.kind for source in layout.recipe.sources))
    for side in SIDES:
        path = shard_path(layout, side, part)
        if is_shard(path):
            continue
        documents, row_of = _documents(layout.place("kept") / part / f"{side}.parquet")
        write_shard(
            path,
            tokenize_documents(documents, encode, functools.partial(_place, part, row_of)),
            kinds=kinds,
            vocab_size=tokenizer.vocab_size,
            end_of_text=tokenizer.end_of_text_id,
            tokenizer=fingerprint,
        )
    return {}


def is_shard(path: Path) -> bool:
    """Whether a whole shard is there."""
    try:
        return read_notes(path).bytes == path.stat().st_size
    except (UserError, OSError):
        return False


def index_sides(layout: Layout) -> dict[str, Any]:
    """Make folders of shards of all parts, and link to them; tokens by side."""
    found = {}
    for side in SIDES:
        paths = [shard_path(layout, side, part) for part in layout.parts]
        if any(read_notes(path).documents_by_kind for path in paths):
            index = index_shards(paths[0].parent, [path.name for path in paths])
            found[side] = sum(index.tokens_by_kind.values())
    if "train" not in found:
        raise UserError(
            f"{layout.folder}: no document is left to train on; `qwen2 corpus report "
            f"{layout.folder}` writes report.html, which tells why"
        )
    link, new = layout.folder / LINK, layout.folder / f".{LINK}.partial"
    new.unlink(missing_ok=True)
    new.symlink_to(layout.place("tokens").name)
    new.replace(link)
    return found


@functools.lru_cache(maxsize=1)  # once a process
def _tokenizer(folder: Path) -> tuple[Tokenizer, str]:
    return Tokenizer.load(folder), sha256_of(folder / "tokenizer.json")


def _documents(path: Path) -> tuple[Iterator[Document], dict[str, int]]:
    """The documents of a file of `kept`, and the row of each by its id."""
    table = pq.read_table(path, columns=["id", "row"])
    rows = dict(zip(table["id"].to_pylist(), table["row"].to_pylist(), strict=True))
    return read_documents(path), rows


def _place(part: str, rows: Mapping[str, int], document: Document) -> tuple[str, int]:
    return part, rows[document.id]
