"""The recipe of a corpus: sources, filter sets, thresholds, and what becomes of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PositiveFloat, model_validator

from qwen2.common.config import Config, read_values
from qwen2.common.recipes import find_recipe
from qwen2.corpus.decontaminate import LcsRule
from qwen2.corpus.filters.rules import Rule, Rules
from qwen2.corpus.filters.sets import FilterSet
from qwen2.corpus.language import LanguageConfig
from qwen2.corpus.minhash import MinHash
from qwen2.corpus.paragraphs import ParagraphRule
from qwen2.corpus.quality.config import QUALITY as LINEAR
from qwen2.corpus.quality.config import QualityConfig
from qwen2.corpus.readers import Source

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]


class LanguageRule(LanguageConfig):
    """How the language is found, and which languages stay. Code has none."""

    keep: tuple[str, ...] | None = None
    """Codes that stay, `mixed` and `unknown` among them if wanted; None: all."""
    agreement: float = Field(default=0.5, ge=0, le=1)
    """Least part of the text in the language that the source says; with less, what is found holds
    instead. The label is checked, not believed."""
    mislabelled: Literal["keep", "drop"] = "keep"
    """What becomes of a document whose label is wrong."""


class Quality(Config):
    """Model-based filters: what scores documents, and which scores are enough."""

    scorers: QualityConfig
    rules: tuple[Rule, ...] = ()
    """Limits of the scores; a document without a score is not dropped for it."""
    bulk: Rule | None = None
    """A rule of the linear classifier's: what fails it goes, and no model reads it."""

    @property
    def limits(self) -> Rules:
        """All rules."""
        return Rules(rules=(*([self.bulk] if self.bulk else []), *self.rules))

    @model_validator(mode="after")
    def _scored(self) -> Self:
        known = self.scorers.columns
        for name in sorted(self.limits.statistics - set(known)):
            raise ValueError(f"rules: no scorer gives {name!r}; there are {', '.join(known)}")
        if self.bulk and not self.bulk.statistic.startswith(LINEAR):
            raise ValueError(f"bulk: {self.bulk.statistic!r} is not the linear classifier's")
        return self


class Deduplication(Config):
    """Exact and near duplicates, over all sources and against older sets."""

    minhash: MinHash = MinHash()
    older: tuple[Path, ...] = ()
    """Runs (their folders) whose documents count as known."""
    paragraphs: ParagraphRule | None = None
    """Repeated paragraphs are removed too; None: they stay."""


class Decontamination(Config):
    """Test sets that must not be in the corpus."""

    test_sets: tuple[Source, ...] = Field(min_length=1)
    rule: LcsRule = LcsRule()
    tokenizer: str = "qwen2"
    """Whose tokens are compared: a folder, or `qwen2` for the published vocabulary."""


class Tokens(Config):
    """Shards of token ids."""

    tokenizer: str = "qwen2"
    """A folder, or `qwen2` for the published vocabulary."""


class CorpusRecipe(Config):
    """From raw text to shards; see docs/data.md."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Of duplicates, the one in the source that stands first here stays."""
    filters: dict[Name, FilterSet] = Field(
        default_factory=lambda: {"none": FilterSet(measures="nothing", pii=None)}
    )
    """By the name that sources call them."""
    language: LanguageRule | None = LanguageRule()
    """None: the sources' labels are believed."""
    quality: Quality | None = None
    shortest: int = Field(default=1, ge=0)
    """Bytes that a document must have after its editors."""
    duplicates: Deduplication = Deduplication()
    decontamination: Decontamination | None = None
    held_out: float = Field(default=0.01, gt=0, lt=1)
    """Fraction of the documents (of the groups, where there are groups) to hold out."""
    seed: int = 0
    """Of the choice of the held-out documents."""
    tokens: Tokens | None = Tokens()
    part_megabytes: PositiveFloat = 16.0
    """Text of a part: what a worker has in memory, and the most that a crash costs it."""

    def filters_of(self, source: str) -> FilterSet:
        """The filter set of the source of this name."""
        return self.filters[next(s.filters for s in self.sources if s.name == source)]

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"sources: two are called {name!r}; ids would not be unique")
        for source in self.sources:
            if source.filters not in self.filters:
                raise ValueError(
                    f"source {source.name!r}: no filter set is called {source.filters!r}; "
                    f"there are {', '.join(self.filters)}"
                )
        return self


def _with_changes(values: Any) -> Any:
    """`{recipe: NAME, megabytes: {SOURCE: LIMIT}, ...}` -> the values of that recipe, changed."""
    if not isinstance(values, dict) or "recipe" not in values:
        return values
    changes = dict(values)
    named = read_values(find_recipe(str(changes.pop("recipe"))))
    limits = dict(changes.pop("megabytes", {}))
    for source in named.get("sources", ()):
        if (limit := limits.pop(source["name"], None)) is not None:
            source["limit"] = {"megabytes": limit}
    if limits:
        known = ", ".join(source["name"] for source in named["sources"])
        raise ValueError(
            f"megabytes: no source is called {next(iter(limits))!r}; there are {known}"
        )
    return named | changes


NamedCorpus = Annotated[CorpusRecipe, BeforeValidator(_with_changes)]
"""The corpus inside another recipe: whole, or the name of one that is shipped or a file, with other
limits of its sources and other values of its keys."""
