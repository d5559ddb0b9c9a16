"""A filter set of a recipe: which editors and rules a source's documents go through.

What is measured and what is decided are apart: `FilterSet.measure` edits and measures texts, once;
`FilterSet.judge` reads the numbers alone, so other limits cost no second pass over the text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from qwen2.common.config import Config
from qwen2.corpus.filters.c4 import C4Lines, keep_lines
from qwen2.corpus.filters.code import without_licence_header
from qwen2.corpus.filters.defaults import CODE_RULES, TEXT_RULES
from qwen2.corpus.filters.measures import (
    CODE_STATISTICS,
    TEXT_STATISTICS,
    Numbers,
    measure_code,
    measure_text,
)
from qwen2.corpus.filters.pii import PII, mask_and_find
from qwen2.corpus.filters.rules import Failure, Limits, Rules

STATISTICS = tuple(dict.fromkeys((*TEXT_STATISTICS, *CODE_STATISTICS)))
"""All that a set can measure."""


@dataclass(frozen=True)
class Edited:
    """Texts after their editors, and what was done and found."""

    texts: list[str]
    edits: list[dict[str, int]]
    """Of each text: lines taken out, finds masked by kind, ...; nothing that is 0."""
    numbers: dict[str, Numbers] = field(default_factory=dict)
    """Each statistic of the set, (texts,)."""


class FilterSet(Config):
    """Editors, what is measured, and the rules that decide."""

    measures: Literal["text", "code", "nothing"] = "text"
    lines: C4Lines | None = None
    """Which lines C4's editor keeps (prose only); None: all."""
    licence_header: bool = True
    """Whether code keeps a first comment that speaks of a licence."""
    pii: PII | None = PII()
    rules: Rules | None = None
    """None: the published ones for what is measured."""
    limits: dict[str, Limits] = Field(default_factory=dict)
    """Rule -> the limits that hold instead, in every language; `{}` for none."""

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, values: Any) -> Any:
        """The rules that hold are written into the recipe that is saved."""
        if isinstance(values, Mapping) and values.get("rules") is None:
            rules = {"text": TEXT_RULES, "code": CODE_RULES}
            return {**values, "rules": rules.get(values.get("measures", "text"), Rules(rules=()))}
        return values

    @model_validator(mode="after")
    def _known(self) -> Self:
        known = self.statistics
        for name in sorted(self._rules.statistics - set(known)):
            raise ValueError(
                f"rules: no statistic is called {name!r} where {self.measures} is measured; "
                f"known: {', '.join(known)}"
            )
        names = {rule.name for rule in self._rules.rules}
        for name in self.limits.keys() - names:
            raise ValueError(f"limits: no rule is called {name!r}")
        if self.lines is not None and self.measures != "text":
            raise ValueError("lines: C4's editor is for prose (measures: text)")
        return self

    @property
    def _rules(self) -> Rules:
        return self.rules or Rules(rules=())

    @property
    def statistics(self) -> tuple[str, ...]:
        """What is measured."""
        return {"text": TEXT_STATISTICS, "code": CODE_STATISTICS, "nothing": ()}[self.measures]

    def measure(self, texts: Sequence[str], languages: Sequence[str | None]) -> Edited:
        """Measure texts as they came, and edit them.

        Args:
            languages: ISO 639 codes of the texts.
        """
        rule = self.lines
        chosen = [keep_lines(text, rule) for text in texts] if rule else list(texts)
        numbers: dict[str, Numbers] = {}
        if self.measures == "text":
            numbers = measure_text(texts, languages, chosen)
        elif self.measures == "code":
            numbers = measure_code(texts)
        edited, edits = [], []
        for before, text in zip(texts, chosen, strict=True):
            lost = before.count("\n") - text.count("\n") + (bool(before) and not text)
            text, done = self._edit(text)
            edited.append(text)
            edits.append({"lines": lost} | done if lost else done)
        return Edited(edited, edits, numbers)

    def _edit(self, text: str) -> tuple[str, dict[str, int]]:
        done: dict[str, int] = {}
        if self.measures == "code" and not self.licence_header:
            without = without_licence_header(text)
            done["licence_header"] = int(without != text)
            text = without
        if self.pii is not None:
            text, finds = mask_and_find(text, self.pii)
            done |= Counter(found.kind for found in finds)
        return text, {name: count for name, count in done.items() if count}

    @property
    def judged(self) -> frozenset[str]:
        """The statistics that the rules read."""
        return self._rules.statistics

    def judge(
        self, columns: Mapping[str, Numbers], languages: Sequence[str | None]
    ) -> list[tuple[Failure, ...]]:
        """The rules that each document fails, in their order; none: it stays.

        Args:
            columns: each of the set's statistics, (documents,).
            languages: of the documents, (documents,).
        """
        if not self._rules.rules:
            return [()] * len(languages)
        return self.in_force.judge_all(
            {name: np.asarray(columns[name]) for name in self._rules.statistics}, languages
        )

    @property
    def in_force(self) -> Rules:
        """The rules with `limits`, which hold in every language."""
        rules = self._rules
        return Rules(
            rules=tuple(
                rule.model_copy(update=self.limits[rule.name].model_dump())
                if rule.name in self.limits
                else rule
                for rule in rules.rules
            ),
            languages={
                language: {name: of for name, of in limits.items() if name not in self.limits}
                for language, limits in rules.languages.items()
            },
        )
