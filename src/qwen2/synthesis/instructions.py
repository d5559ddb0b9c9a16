"""Records of instructions as plain text for pre-training: "high-quality multi-task instruction data
is mixed into the pre-training process" (report, section 3.1). No model is needed.

A line of JSON is taken with `instruction` (and perhaps `input`) and `output`, with names that other
collections use for these, or with `messages`. Each becomes a text in one of several formats, so
that a model doesn't learn one of them by heart (data/instructions.yaml).
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import Field

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.common.templates import Template
from qwen2.corpus.dedup import text_digest
from qwen2.corpus.documents import Document
from qwen2.corpus.files import Skipped
from qwen2.synthesis.generator import digest, well_formed
from qwen2.synthesis.tasks import data_values

KIND = "instruction"
ASKED = ("instruction", "prompt", "question", "query")
ANSWERED = ("output", "response", "completion", "answer")
ROLES = ("system", "user", "assistant")
Formats = Mapping[str, list[Template]]


class InstructionSource(Config):
    """A collection of records."""

    name: str = Field(pattern=r"[^/:]+")
    path: str  # JSONL, perhaps .gz: a file, a folder of them, or a pattern
    licence: str | None = None
    language: str | None = None

    def read(self, paths: list[Path], seed: int) -> Iterator[Document | Skipped]:
        """A document for each record, line after line; a line that is none is skipped."""
        root = Path(os.path.commonpath([path.parent for path in paths]))
        for path in paths:
            for number, line in enumerate(_lines(path), 1):
                place = f"{path.relative_to(root).as_posix()}:{number}"
                try:
                    yield self._document(line, place, str(path), seed)
                except UserError as error:
                    yield Skipped(KIND, str(error), f"{path}:{number}")

    def _document(self, line: bytes, place: str, source: str, seed: int) -> Document:
        values = _parse(line)
        form, asked = ("conversations" if "turns" in values else "tasks"), values.pop("asked")
        templates, hash_ = formats()
        draw = int(digest([seed, self.name, place], 4), 16) % len(templates[form])
        text = templates[form][draw].render(values).strip()
        record = {"task": self.name, "record": place, "prompt": hash_, "format": f"{form}/{draw}"}
        return Document(
            text, f"{self.name}:{place}", source, KIND, self.licence, self.language,
            # The same question, however often and in whatever format, is on one side of a split.
            f"{KIND}:{text_digest(asked).hex()}", {"synthesis": record},
        )  # fmt: skip


@cache
def formats() -> tuple[Formats, str]:
    """The templates by what they render, and a hash of all."""
    values = data_values("instructions")
    what = "instructions.yaml"
    return {
        form: [Template(source, {}, what=what) for source in sources]
        for form, sources in values.items()
    }, digest(values, 8)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked when its name ends in .gz.

    Raises:
        UserError: the file can't be read.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not readable to its end: {error}") from None


def _parse(line: bytes) -> dict[str, Any]:
    """What templates are filled with, and `asked`; a UserError says why there is nothing."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError("not JSON") from None
    if not isinstance(record, dict):
        raise UserError("not a JSON object")
    if "messages" in record:
        turns = _turns(record["messages"])
        return {"turns": turns, "asked": turns[0]["content"]}
    instruction = _text(record, ASKED)
    return {
        "instruction": instruction,
        "input": _text(record, ("input", "context"), needed=False),
        "output": _text(record, ANSWERED),
        "asked": instruction + "\n" + _text(record, ("input", "context"), needed=False),
    }


def _text(record: Mapping[str, Any], names: tuple[str, ...], needed: bool = True) -> str:
    value = next((record[name] for name in names if record.get(name)), "")
    if not isinstance(value, str) or (needed and not value.strip()):
        raise UserError(f"no text in {' or '.join(names)}")
    return well_formed(value).strip()


def _turns(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise UserError("messages are no list of objects")
    turns = [{name: turn.get(name) for name in ("role", "content")} for turn in messages]
    if any(turn["role"] not in ROLES for turn in turns):
        raise UserError(f"a message whose role is none of {', '.join(ROLES)}")
    if any(not isinstance(turn["content"], str) for turn in turns):
        raise UserError("a message without text")
    if [turn["role"] for turn in turns][-2:] != ["user", "assistant"]:
        raise UserError("the last two messages are not a question and its answer")
    return [{**turn, "content": well_formed(turn["content"]).strip()} for turn in turns]
