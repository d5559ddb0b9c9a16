"""Labelled texts: what the scorers of quality learn from.

A label comes from one of three places: each record has its own; or all of a source have one, as
when reference works are positives and the raw crawl is negatives (FineWeb-Edu, DCLM); or a judge
gives it (judge.py).
"""

from __future__ import annotations

import gzip
import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from qwen2.common.config import Config, one_line
from qwen2.common.errors import UserError
from qwen2.corpus.split import choose_held_out

GOOD = 0.5
"""A target from which a text counts as good, where yes or no is asked."""
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Example:
    """A text and how good it is said to be."""

    text: str
    target: float
    """From 0, bad, to 1, good."""
    language: str
    source: str
    """The file it is from."""
    key: str
    """Texts with one key stay on one side when some are held out."""


class TextSource(Config):
    """Texts in a file, or in all files below a folder: JSONL (.jsonl, .jsonl.gz) or Parquet."""

    path: Path
    text: str = "text"
    language: str = "language"
    """Key of the language; a record without it is of language `unknown`."""
    kinds: frozenset[str] = frozenset()
    """Only records whose `kind` is among these; none: all."""
    most: PositiveInt | None = None
    """Take so many at most, chosen by the hashes of the texts."""

    def records(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        """File and place, text, and record of each; or of the `most` with the smallest hashes.

        Raises:
            UserError: no such place, a file that is not readable, or a record without its text.
        """
        found = self._all()
        if self.most is None:
            yield from found
        else:
            yield from heapq.nsmallest(self.most, found, key=lambda each: _hash(each[1]))

    def _all(self) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
        for path in _files(self.path):
            rows = _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path)
            for place, row in rows:
                if self.kinds and row.get("kind") not in self.kinds:
                    continue
                text = row.get(self.text)
                if not isinstance(text, str):
                    raise UserError(f"{place}: no text under {self.text!r}")
                yield place, text, row

    def example(self, text: str, record: Mapping[str, Any], target: float) -> Example:
        """A record with a label."""
        language = str(record.get(self.language) or UNKNOWN)
        key = str(record.get("group") or _hash(text))
        return Example(text, target, language, str(self.path), key)


class LabelSource(TextSource):
    """Texts that all have one `label`, or each its own under `label_key`."""

    label: float | None = Field(default=None, ge=0, le=1)
    """How good all of them are: 1 for positives, 0 for negatives."""
    label_key: str | None = None
    highest: PositiveFloat = 1.0
    """The best of the records' labels, say 5; they are divided by it."""

    @model_validator(mode="after")
    def _one_label(self) -> Self:
        if (self.label is None) == (self.label_key is None):
            raise ValueError("give either label, of all its texts, or label_key, of each one's own")
        return self

    def examples(self) -> Iterator[Example]:
        """The labelled texts.

        Raises:
            UserError: as `records`, or a record's label is missing or out of range.
        """
        for place, text, record in self.records():
            target = self.label if self.label is not None else self._own(place, record)
            yield self.example(text, record, target)

    def _own(self, place: str, record: Mapping[str, Any]) -> float:
        value = record.get(str(self.label_key))
        if not isinstance(value, bool | int | float) or not 0 <= value <= self.highest:
            raise UserError(
                f"{place}: {self.label_key} {value!r}: expected a number from 0 to {self.highest:g}"
            )
        return float(value) / self.highest


def read_examples(sources: Sequence[LabelSource], judged: Sequence[Example] = ()) -> list[Example]:
    """All labelled texts, each once: the judge's label counts, else that of the first source.

    Raises:
        UserError: a source fails, or all texts are good, or all bad.
    """
    examples = {_hash(e.text): e for source in reversed(sources) for e in source.examples()}
    examples |= {_hash(e.text): e for e in judged}
    good = sum(each.target >= GOOD for each in examples.values())
    if not 0 < good < len(examples):
        raise UserError(
            f"labels: {good} of {len(examples)} texts are good; both good and bad ones are needed"
        )
    return [examples[key] for key in sorted(examples)]


def hold_out(
    examples: Sequence[Example], share: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Those to train on, and those to measure by: of each language and class about `share`."""
    sides = [(_class(each), each.key, len(each.text.encode())) for each in examples]
    held = choose_held_out(sides, share, seed)
    parts: tuple[list[Example], list[Example]] = ([], [])
    for each in examples:
        parts[each.key in held].append(each)
    return parts


def balance(examples: Sequence[Example]) -> NDArray[np.float64]:
    """How much each text counts, (texts,), 1 on average: good and bad as much within a language.

    Else a language whose labels are mostly good is taken for a sign of quality. A language with
    labels of one class only can't be balanced; its texts count 1 before all are scaled.
    """
    classes = Counter(map(_class, examples))
    languages = Counter(each.language for each in examples)
    weights = np.ones(len(examples))
    for place, each in enumerate(examples):
        own = classes[_class(each)]
        if own < languages[each.language]:
            weights[place] = languages[each.language] / (2 * own)
    return weights / weights.mean()


def _class(example: Example) -> str:
    return f"{example.language}/{'good' if example.target >= GOOD else 'bad'}"


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _files(path: Path) -> list[Path]:
    """The file itself, or those below a folder, by name."""
    if path.is_file():
        return [path]
    names = ("*.jsonl", "*.jsonl.gz", "*.parquet")
    found = sorted(file for name in names for file in path.rglob(name))
    if not found:
        raise UserError(f"{path}: no such file, or a folder without .jsonl or .parquet files")
    return found


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}:{number}", _object(line, f"{path}:{number}")
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: not readable: {one_line(error)}") from None


def _object(line: bytes, place: str) -> Mapping[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: not JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: not a JSON object")
    return value


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(256):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}:{number}", row
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: not readable as Parquet: {one_line(error)}") from None
