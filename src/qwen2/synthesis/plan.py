"""The records that a recipe asks for, in an order that depends on its documents alone.

What is decided by chance (which tasks an excerpt gets, which style, the seed of its answer) comes
of a hash of the record's name, so that it stays the same whatever else is in the recipe.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwen2.corpus.documents import Document
from qwen2.corpus.language import MIXED, UNKNOWN, canonical, identify
from qwen2.synthesis.excerpts import Excerpt, cut
from qwen2.synthesis.generator import Sampling, digest
from qwen2.synthesis.recipe import SynthesisRecipe
from qwen2.synthesis.tasks import Task
from qwen2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Record:
    """One answer that is wanted, and what it is for."""

    id: str
    task: Task
    parent: Document
    excerpt: Excerpt
    language: str | None
    """Code of the excerpt's language, if it is known."""
    choices: Mapping[str, str]
    sampling: Sampling
    seed: int
    messages: tuple[Mapping[str, str], ...]
    key: str
    """Of its answer in the store: changes with whatever the answer depends on."""


class Plan:
    """The records of a recipe; may be gone through again and again.

    Args:
        identity: who answers.

    Raises:
        UserError: a task can't be.
    """

    def __init__(self, recipe: SynthesisRecipe, identity: Mapping[str, Any]) -> None:
        self.recipe = recipe
        self.identity = identity
        self.fingerprint = digest(dict(identity), 8)
        self.tasks = [
            (Task.of(name, task), recipe.sampling_of(task)) for name, task in recipe.tasks.items()
        ]
        self._tokenizer = _tokenizer()

    def __iter__(self) -> Iterator[Record]:
        """Source after source, document after document, excerpt after excerpt, task after task."""
        for source in self.recipe.sources:
            for document in source.read():
                yield from self._of(document)

    def _of(self, document: Document) -> Iterator[Record]:
        for number, excerpt in enumerate(cut(document.text, self.recipe.excerpt, self._tokenizer)):
            wanted = [
                (task, sampling)
                for task, sampling in self.tasks
                if self._draw(f"{task.name}:{document.id}#{number}", "share") < task.share * 2**31
            ]
            if wanted:
                language = language_of(excerpt.text, document.language)
                for task, sampling in wanted:
                    id_ = f"{task.name}:{document.id}#{number}"
                    yield self._record(id_, task, sampling, document, excerpt, language)

    def _record(
        self,
        id_: str,
        task: Task,
        sampling: Sampling,
        parent: Document,
        excerpt: Excerpt,
        language: str | None,
    ) -> Record:
        choices = {
            name: list(values)[self._draw(id_, name) % len(values)]
            for name, values in task.text.choices.items()
        }
        seed = self._draw(id_, "seed")
        messages = task.messages(excerpt.text, language, choices)
        asked: Sequence[Any] = [
            task.name, task.hash, list(messages), sampling.model_dump(), seed, dict(self.identity)
        ]  # fmt: skip
        return Record(
            id_, task, parent, excerpt, language, choices, sampling, seed, messages, digest(asked)
        )

    def _draw(self, id_: str, use: str) -> int:
        """A number from 0 to 2^31 - 1."""
        return int(digest([self.recipe.seed, id_, use], 4), 16) >> 1


@functools.cache
def _tokenizer() -> Tokenizer:
    """The published one whoever answers, so that excerpts are the same for every model."""
    return Tokenizer.qwen2()


def language_of(text: str, label: str | None) -> str | None:
    """The code of what a text is written in; the source's label where the text doesn't tell."""
    found = identify(text).language
    if found not in (UNKNOWN, MIXED):
        return found
    return canonical(label) if label else None
