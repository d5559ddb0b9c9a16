"""Rules as data: a statistic and its limits. Deciding is apart from measuring.

A filter measures once; its numbers are stored with the document. Rules are applied to stored
numbers, so a relaxed threshold costs no second pass over the text, as the report's relaxed set
(section 3.1) wants. A decision names each rule that failed, its value and its limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from qwen2.common.config import Config
from qwen2.common.errors import UserError


class Limits(Config):
    """What a statistic may be: both ends included; an absent end is open."""

    least: float | None = None
    greatest: float | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.least is not None and self.greatest is not None and self.least > self.greatest:
            raise ValueError(f"least {self.least} is above greatest {self.greatest}")
        return self


class Rule(Limits):
    """A document is dropped when `statistic` is outside the limits."""

    name: str
    statistic: str


@dataclass(frozen=True, slots=True)
class Failure:
    """A rule that a document failed, with the evidence."""

    rule: str
    statistic: str
    value: float
    least: float | None
    greatest: float | None

    def __str__(self) -> str:
        below = self.least is not None and self.value < self.least
        sign, limit = ("<", self.least) if below else (">", self.greatest)
        return f"{self.rule}: {self.statistic} {self.value:.4g} {sign} {limit:g}"


class Rules(Config):
    """An ordered list of rules, and other limits for some of them in some languages."""

    rules: tuple[Rule, ...]
    languages: dict[str, dict[str, Limits]] = Field(default_factory=dict)
    """Language -> rule -> the limits that hold instead; `{}` for none."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [rule.name for rule in self.rules]
        twice = {name for name in names if names.count(name) > 1}
        if twice:
            raise ValueError(f"two rules are called {', '.join(sorted(twice))}")
        for language, limits in self.languages.items():
            for name in limits.keys() - set(names):
                raise ValueError(f"languages.{language}: no rule is called {name!r}")
        return self

    @property
    def statistics(self) -> frozenset[str]:
        """What must have been measured."""
        return frozenset(rule.statistic for rule in self.rules)

    def limits(self, rule: Rule, language: str | None) -> Limits:
        """What holds for `rule` in `language`."""
        return self.languages.get(language or "", {}).get(rule.name, rule)

    def judge(self, numbers: Mapping[str, float], language: str | None) -> tuple[Failure, ...]:
        """The rules that a document with these `numbers` fails, in their order; none: it stays."""
        columns = {name: np.array([value]) for name, value in numbers.items()}
        return self.judge_all(columns, [language])[0]

    def judge_all(
        self, columns: Mapping[str, NDArray[np.floating]], languages: Sequence[str | None]
    ) -> list[tuple[Failure, ...]]:
        """`judge` for many documents at once.

        Args:
            columns: each statistic of all documents, (documents,).
            languages: of the documents.

        Raises:
            UserError: a statistic was not measured.
        """
        for name in sorted(self.statistics - columns.keys()):
            raise UserError(f"no statistic {name!r} was measured; measure the documents again")
        found: list[list[Failure]] = [[] for _ in languages]
        kinds, kind_of = np.unique([lang or "" for lang in languages], return_inverse=True)
        for rule in self.rules:
            limits = [self.limits(rule, str(kind)) for kind in kinds]
            least = np.array([-np.inf if lim.least is None else lim.least for lim in limits])
            greatest = np.array(
                [np.inf if lim.greatest is None else lim.greatest for lim in limits]
            )
            values = columns[rule.statistic]
            failed = (values < least[kind_of]) | (values > greatest[kind_of])
            for index in np.flatnonzero(failed).tolist():
                limit = limits[kind_of[index]]
                found[index].append(
                    Failure(
                        rule.name,
                        rule.statistic,
                        float(values[index]),
                        limit.least,
                        limit.greatest,
                    )
                )
        return [tuple(failures) for failures in found]
