"""Recipes of experiments with proxy models: their text, their models, what is compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.corpus.mixing_law import BOOSTED_FROM, LawName
from qwen2.corpus.quality.config import QUALITY
from qwen2.model.config import ModelConfig
from qwen2.pipeline.corpus.recipe import NamedCorpus
from qwen2.tokens.remap import LEAST_SIZE
from qwen2.train.pretrain import PretrainRecipe


class GivenShards(Config):
    """Text that is there: folders of shards, and of the tokenizer that made them.

    `{run: DIR}` stands for those of a finished `qwen2 corpus run`.
    """

    train: Path
    held_out: Path
    tokenizer: Path

    @model_validator(mode="before")
    @classmethod
    def _of_run(cls, values: Any) -> Any:
        if isinstance(values, dict) and set(values) == {"run"}:
            folder = Path(values["run"]) / "shards"
            return {name: folder / name for name in cls.model_fields}
        return values


class ProxyConfig(Config):
    """A proxy model and its training: AdamW, a tenth of warm-up, a cosine to a twentieth."""

    model: ModelConfig
    tokens: int = Field(gt=0)  # of the small vocabulary
    context: int = Field(gt=1)
    rows: int = Field(gt=0)  # of a step
    lr: float = Field(gt=0)
    dtype: Literal["bf16", "fp32"] = "bf16"

    @property
    def steps(self) -> int:
        """Updates; the tokens are rounded up."""
        return -(-self.tokens // (self.context * self.rows))


class ProxyExperiment(Config):
    """What experiments with proxies share: `corpus`, run here, or `shards` that are there."""

    corpus: NamedCorpus | None = None
    shards: GivenShards | None = None
    vocabulary: int = Field(ge=LEAST_SIZE)  # tokens of the proxies, the most used of all
    evaluated_kilobytes: int = Field(gt=0)  # held-out text of each kind
    validation: ProxyConfig
    seeds: int = Field(default=3, ge=3)  # runs of each arm
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_text(self) -> Self:
        if (self.corpus is None) == (self.shards is None):
            raise ValueError("give either corpus (a recipe, run here) or shards (folders)")
        if self.corpus is not None and self.corpus.tokens is None:
            raise ValueError("corpus.tokens must not be null: proxies read its shards")
        for name, proxy in self.proxy_configs().items():
            if proxy.model.vocab_size != self.vocabulary:
                raise ValueError(
                    f"{name}.model.vocab_size {proxy.model.vocab_size} is not "
                    f"vocabulary {self.vocabulary}"
                )
            if proxy.context > proxy.model.max_position_embeddings:
                raise ValueError(f"{name}.context exceeds its model.max_position_embeddings")
        return self

    def proxy_configs(self) -> dict[str, ProxyConfig]:
        """All proxies by their key."""
        return {"validation": self.validation}

    @property
    def most_read(self) -> int:
        """Tokens of one kind that a proxy may want."""
        return max(proxy.tokens for proxy in self.proxy_configs().values())


class MixtureRecipe(ProxyExperiment):
    """Choose weights over the kinds of document for the training run `train`."""

    experiment: Literal["mixture"]
    proxy: ProxyConfig
    proxies: int = Field(ge=8)  # mixtures drawn
    law: LawName = "auto"
    bootstraps: int = Field(default=200, gt=0)
    least: float = Field(default=0.01, ge=0, lt=1)  # of every weight
    epochs: float = Field(default=4.0, gt=0)
    """How often `train` may read a source: up to 4 times costs little (Muennighoff et al. 2023)."""
    temperature: float = Field(default=2.0, ge=1)  # of the mixture p^(1/T) it is compared with
    importance: dict[str, float] | None = None  # of the kinds' bits per byte; None: all alike
    train: dict[str, Any]
    """A recipe of pre-training without data, tokenizer and weights; its tokens are the budget."""

    @model_validator(mode="after")
    def _trains(self) -> Self:
        if self.law == "lightgbm" and self.proxies < BOOSTED_FROM:
            raise ValueError(f"law lightgbm needs {BOOSTED_FROM} proxies or more")
        for key in ("data", "tokenizer", "weights"):
            if key in self.train:
                raise ValueError(f"train: leave {key} out, it comes of this run")
        self.train_recipe(Path(), Path(), {})
        return self

    def proxy_configs(self) -> dict[str, ProxyConfig]:
        return {"proxy": self.proxy, **super().proxy_configs()}

    def train_recipe(
        self, data: Path, tokenizer: Path, weights: dict[str, float]
    ) -> PretrainRecipe:
        """`train` with what was left out."""
        values = self.train | {"data": data, "tokenizer": tokenizer, "weights": weights or None}
        try:
            return PretrainRecipe.parse(values, "train")
        except UserError as error:
            raise ValueError(str(error)) from None

    @property
    def budget(self) -> int:
        """Tokens that the chosen mixture is for."""
        return self.train_recipe(Path(), Path(), {}).total_tokens


class StoredScores(Config):
    """What the stage `scores` of a corpus run kept: no text is read for it."""

    run: Path
    column: str = QUALITY
    """More is better: `quality`, `head`, or a percentile of theirs."""


class ThresholdRecipe(ProxyExperiment):
    """Strict against relaxed quality threshold at equal compute (report section 3.1)."""

    experiment: Literal["relaxed_threshold"]
    scores: Path | StoredScores | None = None
    """Parquet with a column `score`, a row for each document of the shards in their order; or those
    of the corpus run that made the shards; None: by how little zlib shrinks a document, which
    stands in for a model's judgement."""
    relaxed_share: float = Field(default=1.0, gt=0, le=1)  # of each kind's tokens
    ratio: float = Field(default=12 / 7, gt=1)  # of the relaxed set's tokens to the strict one's
    margin: float = Field(gt=0)  # bits per byte within which the two count as equal
    alpha: float = Field(default=0.05, gt=0, lt=0.5)

    @property
    def most_read(self) -> int:
        """So many that even the strict set is repeated only where all the text would make it be."""
        return math.ceil(super().most_read * self.ratio / self.relaxed_share)
