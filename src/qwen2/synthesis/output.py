"""What a run leaves: documents with their provenance, those that were rejected, a summary.

All of it is made anew from the answers, in the order of the records: however often a run was broken
off, and in whatever order answers came, the bytes are the same.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow.parquet as pq

from qwen2.common.files import durable_folder
from qwen2.corpus.documents import (
    ROW_GROUP_BYTES,
    ROW_GROUP_DOCUMENTS,
    SCHEMA,
    Document,
    table_of,
)
from qwen2.corpus.files import Skipped
from qwen2.corpus.split import group_of_derived
from qwen2.synthesis.checks import judge
from qwen2.synthesis.generator import Answer
from qwen2.synthesis.plan import Plan, Record
from qwen2.synthesis.recipe import matching
from qwen2.synthesis.store import Answers

DOCUMENTS, REJECTED = "documents", "rejected"
SAMPLES = 4  # of each task and outcome


@dataclass(frozen=True)
class Sample:
    """A record for the page."""

    id: str
    task: str
    reason: str | None
    source: str
    output: str
    details: dict[str, Any]


@dataclass
class Tally:
    """What became of the records of a task."""

    records: int = 0
    kept: int = 0
    failed: int = 0  # no answer
    rejected: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def as_json(self) -> dict[str, Any]:
        rejected = dict(sorted(self.rejected.items(), key=lambda item: (-item[1], item[0])))
        return {**self.__dict__, "rejected": rejected}


@dataclass
class Made:
    """Counts by task, and samples of each."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    _samples: dict[tuple[str, bool], list[tuple[int, str, Sample]]] = field(default_factory=dict)

    def count(self, task: str) -> Tally:
        tally = self.tallies.setdefault(task, Tally())
        tally.records += 1
        return tally

    def show(self, sample: Sample) -> None:
        """Those with the smallest hashes are kept: a fair sample, and the same one each time."""
        heap = self._samples.setdefault((sample.task, sample.reason is None), [])
        number = int.from_bytes(hashlib.blake2b(sample.id.encode(), digest_size=8).digest())
        heapq.heappush(heap, (-number, sample.id, sample))
        if len(heap) > SAMPLES:
            heapq.heappop(heap)

    @property
    def samples(self) -> list[Sample]:
        """Task after task, those that were kept first."""
        places = sorted(
            self._samples, key=lambda key: (list(self.tallies).index(key[0]), not key[1])
        )
        return [sample for place in places for *_, sample in sorted(self._samples[place])[::-1]]


class DocumentFile:
    """A Parquet file of documents that grows one by one."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._batch: list[Document] = []
        self._size = 0

    def add(self, document: Document) -> None:
        self._batch.append(document)
        self._size += document.size
        if self._size >= ROW_GROUP_BYTES or len(self._batch) == ROW_GROUP_DOCUMENTS:
            self._flush()

    def _flush(self) -> None:
        if self._batch:
            self._writer.write_table(table_of(self._batch))
        self._batch, self._size = [], 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def write_outputs(plan: Plan, answers: Answers, out: Path) -> Made:
    """Write `documents/` and `rejected/` into `out`, in place of what is there; both are durable.

    Records without an answer yet are passed over.
    """
    made = Made()
    folders = [durable_folder(out / name, overwrite=True) for name in (DOCUMENTS, REJECTED)]
    with folders[0] as kept_in, folders[1] as rejected_in, ExitStack() as files:
        kept = files.enter_context(DocumentFile(kept_in / f"{DOCUMENTS}.parquet"))
        rejected = files.enter_context(DocumentFile(rejected_in / f"{REJECTED}.parquet"))
        for document, is_kept in _documents(plan, answers, made):
            (kept if is_kept else rejected).add(document)
    return made


def _documents(plan: Plan, answers: Answers, made: Made) -> Iterator[tuple[Document, bool]]:
    """Every document in its order, and whether it is kept."""
    for record in plan:
        answer = answers.get(record.key)
        if answer is not None:
            yield _from_answer(plan, record, answer, made)
    for source in plan.recipe.instructions:
        for found in source.read(matching(source.path, "*.jsonl*"), plan.recipe.seed):
            tally = made.count(source.name)
            if isinstance(found, Skipped):
                tally.rejected[found.reason] += 1
                origin = {"task": source.name, "reason": found.reason}
                yield Document(
                    "", f"{source.name}:{found.source}", found.source, found.kind,
                    metadata={"synthesis": origin},
                ), False  # fmt: skip
            else:
                tally.kept += 1
                tally.bytes += found.size
                made.show(Sample(found.id, source.name, None, "", found.text, {}))
                yield found, True


def _from_answer(plan: Plan, record: Record, answer: Answer, made: Made) -> tuple[Document, bool]:
    task, excerpt = record.task, record.excerpt
    tally = made.count(task.name)
    tally.prompt_tokens += answer.prompt_tokens
    tally.completion_tokens += answer.completion_tokens
    measured: dict[str, float] = {}
    reason: str | None
    if answer.finish_reason == "failed":
        text, reason = "", answer.error or "no answer"
        tally.failed += 1
    else:
        messages = task.messages("", record.language, record.choices)
        asked = "\n".join(message["content"] for message in messages)
        text = task.document(answer.text, asked, record.seed)
        reason, measured = judge(
            answer, text, excerpt.text, asked, record.language, task.checks
        )  # fmt: skip
    if reason is None:
        tally.kept += 1
        tally.bytes += len(text.encode())
    elif answer.finish_reason != "failed":
        tally.rejected[reason] += 1
    details = {"choices": dict(record.choices), "checks": measured}
    shown = text if reason is None else answer.text
    made.show(Sample(record.id, task.name, reason, excerpt.text, shown, details))
    return _document(plan, record, answer, shown, reason, details), reason is None


def _document(
    plan: Plan,
    record: Record,
    answer: Answer,
    text: str,
    reason: str | None,
    details: dict[str, Any],
) -> Document:
    """A document with all that tells where it comes from, and nothing of when."""
    parent, task = record.parent, record.task
    origin = {
        "parent": parent.id,
        "excerpt": [record.excerpt.start, record.excerpt.stop],  # characters
        "task": task.name,
        "prompt": task.hash,
        "generator": plan.fingerprint,
        "model": plan.identity["model"],
        "sampling": record.sampling.model_dump(),
        "seed": record.seed,
        **details,
    }
    if answer.served_by is not None:
        origin["served_by"] = answer.served_by
    if reason is not None:
        origin["reason"] = reason
    return Document(
        text, record.id, parent.source, task.text.kind, parent.licence,
        record.language, group_of_derived(parent), {"synthesis": origin},
    )  # fmt: skip
