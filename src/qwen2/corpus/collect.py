"""Collect the real text that every machine with Python has, and make a corpus folder of it.

Stands in for the report's web-scale sources (section 3.1) so that the whole system runs on real
text with no network: collect -> exact deduplication -> split into train and held-out.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeFloat

from qwen2.common.config import Config
from qwen2.common.files import durable_folder
from qwen2.common.progress import Progress
from qwen2.corpus import share, stdlib
from qwen2.corpus.dedup import deduplicate
from qwen2.corpus.documents import Document, read_documents, write_documents
from qwen2.corpus.files import Found, Skipped
from qwen2.corpus.split import choose_held_out, split_key

MIN_DOCUMENT = 200  # bytes; less is a stub
MAX_DOCUMENT = 1 << 20  # bytes, and at most a quarter of the cap: one text must not fill it
TRAIN, HELD_OUT, SUMMARY = "train.parquet", "held_out.parquet", "summary.json"


class Megabytes(Config):
    """Cap of each kind in 10^6 bytes of UTF-8, before deduplication."""

    code: NonNegativeFloat = 8.0
    docstrings: NonNegativeFloat = 4.0
    reference: NonNegativeFloat = 1.0
    prose: NonNegativeFloat = 8.0
    multilingual: NonNegativeFloat = 8.0


class LocalConfig(Config):
    """How much local text to collect, and how to split it."""

    megabytes: Megabytes = Megabytes()
    held_out: float = Field(default=0.05, gt=0, lt=1)
    """Fraction of the split groups to hold out."""
    seed: int = 0


@dataclass(frozen=True)
class Places:
    """Where to look."""

    stdlib: Path
    shares: tuple[Path, ...]


@dataclass
class Tally:
    """What a collection took, by kind, and what it left and why."""

    documents: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    skipped: dict[str, Counter[str]] = field(default_factory=dict)
    capped: set[str] = field(default_factory=set)

    def skip(self, kind: str, reason: str) -> None:
        self.skipped.setdefault(kind, Counter())[reason] += 1

    def add(self, document: Document) -> None:
        self.documents[document.kind] += 1
        self.bytes[document.kind] += document.size


def this_machine() -> Places:
    """The standard library of this Python and the share folders of it and of the system."""
    prefixes = [sys.prefix, sys.base_prefix, "/usr/local", "/usr"]
    shares = tuple(dict.fromkeys(Path(prefix, "share").resolve() for prefix in prefixes))
    return Places(Path(sysconfig.get_path("stdlib")).resolve(), shares)


def collect_local(
    places: Places, caps: Mapping[str, int], tally: Tally, progress: Progress | None = None
) -> Iterator[Document]:
    """Stream the documents of `places`, kind after kind, in an order that depends on names only.

    Args:
        caps: bytes of UTF-8 by kind. The first document that would pass the cap ends its kind, so
            a kind with text enough comes to three quarters of its cap at least.
        tally: counts what was taken and what was skipped.
        progress: told the bytes so far; its total is the sum of the caps.

    A folder that is missing gives nothing. See `SOURCES` for the kinds.
    """
    finished = 0
    for kind, cap in caps.items():
        longest = min(MAX_DOCUMENT, cap // 4)
        for found in SOURCES[kind](places):
            if isinstance(found, Skipped):
                tally.skip(kind, found.reason)
            elif reason := _unfit(found, longest):
                tally.skip(kind, reason)
            elif tally.bytes[kind] + found.size > cap:
                tally.capped.add(kind)
                break
            else:
                tally.add(found)
                yield found
                if progress:
                    progress.update(finished + tally.bytes[kind], kind=kind)
        finished += cap
    if progress:
        progress.update(finished, documents=tally.documents.total())


SOURCES: dict[str, Callable[[Places], Iterator[Found]]] = {
    "code": lambda places: stdlib.code(places.stdlib),
    "docstrings": lambda places: stdlib.docstrings(places.stdlib),
    "reference": lambda places: stdlib.reference(),
    "prose": lambda places: share.prose(places.shares),
    "multilingual": lambda places: share.multilingual(places.shares),
}


def build_corpus(folder: Path, config: LocalConfig, places: Places | None = None) -> dict[str, Any]:
    """Write train.parquet, held_out.parquet and summary.json into `folder`; returns the summary.

    Durable: the folder appears whole, with its manifest, or not at all. The same files and the
    same configuration give the same bytes.

    Raises:
        UserError: `folder` exists or the disk is full.
    """
    caps = {kind: int(cap * 1e6) for kind, cap in config.megabytes.model_dump().items()}
    tally, removed = Tally(), Counter[str]()
    with durable_folder(folder) as partial, Progress("collect", sum(caps.values())) as progress:
        everything = partial / "all.parquet"
        documents = collect_local(places or this_machine(), caps, tally, progress)
        write_documents(everything, deduplicate(documents, removed))

        keys = ((d.kind, split_key(d), d.size) for d in read_documents(everything))
        held = choose_held_out(keys, config.held_out, config.seed)
        sides = {TRAIN: Tally(), HELD_OUT: Tally()}
        for name, side in sides.items():
            inside = name == HELD_OUT
            chosen = (d for d in read_documents(everything) if (split_key(d) in held) == inside)
            write_documents(partial / name, _tallied(chosen, side))
        everything.unlink()

        summary = _summary(config, caps, tally, removed, sides)
        (partial / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def _unfit(document: Document, longest: int) -> str | None:
    """Why `document` is not taken, if it is not."""
    try:
        size = document.size
    except UnicodeEncodeError:
        return "lone surrogates"
    if size < MIN_DOCUMENT:
        return f"shorter than {MIN_DOCUMENT} bytes"
    return f"longer than {longest} bytes" if size > longest else None


def _tallied(documents: Iterable[Document], tally: Tally) -> Iterator[Document]:
    for document in documents:
        tally.add(document)
        yield document


def _summary(
    config: LocalConfig,
    caps: Mapping[str, int],
    tally: Tally,
    removed: Counter[str],
    sides: Mapping[str, Tally],
) -> dict[str, Any]:
    kinds = {
        kind: {
            "documents": tally.documents[kind],
            "bytes": tally.bytes[kind],
            "cap_reached": kind in tally.capped,
            "skipped": dict(sorted(tally.skipped.get(kind, {}).items())),
            "duplicates": removed[kind],
            **{
                name.removesuffix(".parquet"): {
                    "documents": side.documents[kind],
                    "bytes": side.bytes[kind],
                }
                for name, side in sides.items()
            },
        }
        for kind in caps
    }
    return {"config": config.model_dump(mode="json"), "kinds": kinds}
