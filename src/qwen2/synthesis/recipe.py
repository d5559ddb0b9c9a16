"""Recipes of synthesis: which documents, which tasks, who answers."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.corpus.documents import Document, read_documents
from qwen2.synthesis.endpoint import EndpointConfig, EndpointGenerator, identity_of_endpoint
from qwen2.synthesis.excerpts import ExcerptConfig
from qwen2.synthesis.generator import Generator, Sampling
from qwen2.synthesis.in_process import EngineGenerator, InProcess, identity_in_process
from qwen2.synthesis.instructions import InstructionSource
from qwen2.synthesis.tasks import TaskConfig


class DocumentSource(Config):
    """Documents that something is made of: Parquet as the corpus writes it."""

    path: str  # a file, a folder of them, or a pattern
    kinds: tuple[str, ...] | None = None  # None: all
    documents: int | None = Field(default=None, ge=1)  # the first ones; None: all

    def read(self) -> Iterator[Document]:
        """Its documents, file after file by name.

        Raises:
            UserError: there are no such files, or one is broken.
        """
        count = 0
        for path in matching(self.path, "*.parquet"):
            for document in read_documents(path):
                if self.kinds is None or document.kind in self.kinds:
                    yield document
                    count += 1
                    if count == self.documents:
                        return


class SynthesisRecipe(Config):
    """What `qwen2 synth text` makes."""

    sources: tuple[DocumentSource, ...] = ()
    tasks: dict[str, TaskConfig] = Field(default_factory=dict)
    instructions: tuple[InstructionSource, ...] = ()
    excerpt: ExcerptConfig = ExcerptConfig()
    sampling: Sampling = Sampling()
    seed: int = 0
    model: str | None = None
    """MODEL as for every command; with an endpoint, the name that it is asked for by."""
    revision: str | None = None
    """What tells an endpoint's model from another of the same name, where you know it."""
    in_process: InProcess = InProcess()
    endpoint: EndpointConfig = EndpointConfig()

    @model_validator(mode="after")
    def _is_something(self) -> Self:
        if not self.instructions and not (self.sources and self.tasks):
            raise ValueError("nothing to make: give sources and tasks, or instructions")
        if bool(self.sources) != bool(self.tasks):
            raise ValueError("sources go with tasks: give both or neither")
        if self.tasks and self.model is None:
            raise ValueError("tasks need a `model`")
        for name, task in self.tasks.items():
            if "/" in name or ":" in name:
                raise ValueError(f"task {name!r}: a name has neither / nor :")
            self.sampling_of(task)
        names = [source.name for source in self.instructions]
        if len({*names, *self.tasks}) < len(names) + len(self.tasks):
            raise ValueError("two tasks or sets of instructions have the same name")
        return self

    def sampling_of(self, task: TaskConfig) -> Sampling:
        """The recipe's sampling with what the task changes."""
        try:
            return Sampling.parse({**self.sampling.model_dump(), **task.sampling}, "sampling")
        except UserError as error:
            raise ValueError(str(error)) from None

    def identity(self) -> dict[str, Any]:
        """What tells who answers; see the two kinds of generators."""
        assert self.model is not None
        if self.endpoint.url is None:
            return identity_in_process(self.model, self.in_process)
        return identity_of_endpoint(self.model, self.revision)

    def open(self) -> Generator:
        """Who answers, ready to be asked.

        Raises:
            UserError: the model can't be had.
        """
        assert self.model is not None
        if self.endpoint.url is None:
            return EngineGenerator.load(self.model, self.in_process)
        return EndpointGenerator(self.endpoint, self.model)


def matching(path: str, inside: str) -> list[Path]:
    """A file, those of a folder that are called like `inside`, or those that match a pattern.

    Raises:
        UserError: there are none.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        found = sorted(p for p in place.rglob(inside) if not p.name.startswith("."))
    else:
        named = [place] if place.is_file() else None
        # Path.glob takes no absolute pattern.
        found = named or sorted(map(Path, glob.glob(path, recursive=True)))  # noqa: PTH207
    if not found:
        raise UserError(f"{path}: no such file, nor {inside} in a folder of that name")
    return found
