"""What a quickstart is made of: how much of everything, and how its time is shared out."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from qwen2.common.config import Config
from qwen2.model.config import ModelConfig
from qwen2.model.upcycle import UpcycleConfig
from qwen2.pipeline.corpus.recipe import NamedCorpus
from qwen2.pipeline.stages import Run


class TimeShares(Config):
    """How the time that is left for training is shared among its stages."""

    pretrain: float = Field(gt=0)
    long_context: float = Field(gt=0)
    mixture: float = Field(gt=0)


class QuickstartRecipe(Config):
    """How much of everything; `minutes` scales the training to fill the time."""

    minutes: float = Field(default=8.0, gt=0)
    corpus: NamedCorpus  # without tokens: the vocabulary is trained on it
    vocab_size: int = Field(gt=258)
    tokenizer_megabytes: float = Field(gt=0)  # of training text that the merges are counted on
    model: ModelConfig
    context: int = Field(gt=1)
    long_context: int = Field(gt=1)  # tokens, after the long-context stage
    rows: int = Field(gt=0)  # of `context` tokens in a step; of long rows, as many tokens or one
    upcycle: UpcycleConfig
    lr: float = Field(gt=0)
    further_lr: float = Field(gt=0)  # of the stages that begin from the pre-trained model
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """What is computed in; auto: bf16 where the device has products of it."""
    seed: int = 0
    evaluated_kilobytes: int = Field(gt=0)  # held-out text of each kind
    watched_tokens: int = Field(gt=0)  # of each kind, measured again and again during training
    reserve_seconds: float = Field(ge=0)  # kept free for the stages after training
    shares: TimeShares
    max_steps: int | None = Field(default=None, gt=0)  # of each training stage
    prompts: dict[str, str]

    @model_validator(mode="after")
    def _longer(self) -> Self:
        if self.long_context <= self.context:
            raise ValueError("long_context must be longer than context")
        if self.corpus.tokens is not None:
            raise ValueError("corpus.tokens must be null: the vocabulary is trained on the corpus")
        return self


QuickRun = Run[QuickstartRecipe]
