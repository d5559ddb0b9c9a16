"""Our side of `corpus.py`: one filter alone, its decisions, and the whole pipeline in a row."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen2.corpus import Document, read_documents, write_documents
from qwen2.corpus.filters import (
    TEXT_RULES,
    C4Lines,
    Rules,
    c4,
    fineweb,
    gopher,
    measure_text,
    repetition,
)
from qwen2.corpus.filters.defaults import C4, FINEWEB, GOPHER_QUALITY, GOPHER_REPETITION
from qwen2.corpus.filters.rules import Limits
from qwen2.corpus.filters.words import Words, batches, split
from qwen2.corpus.language import identify
from qwen2.corpus.minhash import MinHash
from qwen2.corpus.near_duplicates import dropped_rows, find_duplicates, without
from qwen2.corpus.sketches import write_sketches
from qwen2.tokenizer import Tokenizer

SPACED = frozenset(
    ("de", "fr", "es", "it", "pt", "ru", "pl", "nl", "cs", "sv", "da", "tr", "id", "ca", "el", "uk",
     "ro", "hu", "fi")
)  # fmt: skip
Row = dict[str, Any]
Measure = Callable[[Sequence[str], Words, Sequence[str | None]], dict[str, Any]]

LINES = C4Lines()
FILTERS: dict[str, tuple[Rules, Measure]] = {
    "gopher_repetition": (
        Rules(rules=GOPHER_REPETITION),
        lambda texts, words, _: repetition.measure(texts, words),
    ),
    "gopher_quality": (
        Rules(rules=GOPHER_QUALITY, languages={"en": {"gopher_stop_words": Limits(least=2)}}),
        gopher.measure,
    ),
    "c4": (Rules(rules=C4), lambda texts, words, _: c4.measure(texts, words)),
    "fineweb": (Rules(rules=FINEWEB), lambda texts, words, _: fineweb.measure(texts, words)),
}
FAMILY = MinHash()


def timed_filter(name: str, rows: list[Row]) -> float:
    """Processor seconds of one filter, or of `language`."""
    started = time.process_time()
    if name == "language":
        for row in rows:
            identify(row["text"])
    else:
        decide(name, rows, stop_words=True)
    return time.process_time() - started


def decide(name: str, rows: list[Row], stop_words: bool) -> list[list[str]]:
    """Names of the rules that each document fails, by the published limits for all languages."""
    rules, measure = FILTERS[name]
    found: list[list[str]] = []
    for part in batches([row["text"] for row in rows]):
        some = rows[part]
        texts = [row["text"] for row in some]
        codes = ["en" if stop_words else None for _ in some]
        if name == "c4":
            texts = [c4.keep_lines(text, LINES) for text in texts]
        numbers = measure(texts, split(texts), codes)
        found += [[f.rule for f in failed] for failed in rules.judge_all(numbers, codes)]
    return found


def common(rows: list[Row], tokenizer: Tokenizer) -> dict[str, Any]:
    """Language, all filters, near-duplicates, tokens: processor seconds and what became of each.

    Every document is measured by every filter, as the pipeline stores all numbers.
    """
    started = time.process_time()
    texts = [row["text"] for row in rows]
    codes = [identify(text).language for text in texts]
    failed = TEXT_RULES.judge_all(measure_text(texts, codes, LINES), codes)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        stay = [
            Document(row["text"], row["id"], "", "")
            for row, why in zip(rows, failed, strict=True)
            if not why
        ]
        write_documents(place / "documents.parquet", stay)
        write_sketches(place / "sketches", read_documents(place / "documents.parquet"), FAMILY)
        find_duplicates(place / "found", [place / "sketches"], FAMILY)
        kept = list(without(stay, dropped_rows(place / "found", 0)))
        tokens = sum(len(tokenizer.encode(document.text)) for document in kept)
    seconds = time.process_time() - started
    return {
        "seconds": seconds,
        "dropped": [bool(why) for why in failed],
        "kept": len(kept),
        "tokens": tokens,
    }
