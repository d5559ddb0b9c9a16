"""Choosing the next token from logits: pure functions, randomness passed in.

The order is that of the OpenAI API's settings, then of a published `generation_config.json` in
transformers:

    logit bias, repetition penalty, frequency and presence penalty, grammar    change logits
    temperature, top-k, top-p, min-p                                           choose among them

Each draw takes one uniform number from the completion's own generator, and so the same seed gives
the same completion whatever else is in the batch, and after an interruption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from qwen2.common.config import Config

COLDEST = 1e-4  # a temperature below it is greedy: no other token is left, and quotients overflow

Bias = Annotated[float, Field(ge=-100, le=100)]


class Grammar(Config):
    """What the text of a completion must be; see grammar.py."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str


class SamplingParams(Config):
    """How one completion is drawn; temperature 0 is greedy."""

    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=100)
    top_k: int = Field(default=0, ge=0)  # 0: all tokens
    top_p: float = Field(default=1.0, gt=0, le=1)
    min_p: float = Field(default=0.0, ge=0, le=1)  # least share of the likeliest's probability
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)  # Keskar et al. 2019
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)  # of the OpenAI API, as is the next
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    logit_bias: dict[int, Bias] = Field(default_factory=dict)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)  # None: differs each time
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=100)
    """Alternatives to report for each token drawn; 0: the drawn token alone, None: nothing."""
    prompt_logprobs: int | None = Field(default=None, ge=0, le=100)
    """The same for each token of the prompt but the first."""
    grammar: Grammar | None = None

    def generator(self) -> torch.Generator:
        """A source of randomness of this completion's own, so that a batch changes nothing."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken."""
        return self.temperature < COLDEST

    @property
    def plain(self) -> bool:
        """Whether the model's own logits decide, with nothing that changes them."""
        return not self.logit_bias and self.grammar is None and self.unpenalized

    @property
    def unpenalized(self) -> bool:
        """Whether it makes no difference what was said before."""
        penalties = self.repetition_penalty - 1, self.presence_penalty, self.frequency_penalty
        return penalties == (0, 0, 0)


class ConstraintError(Exception):
    """A grammar cannot go on: this completion ends with an error, and no other."""


class Constraint(Protocol):
    """A grammar at work in one completion; see grammar.py."""

    def mask(self, logits: Tensor) -> Tensor:
        """logits (V,) with -inf for every token that may not come next; at least one may."""

    def accept(self, token: int) -> None:
        """`token` has come."""

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""


class Sampler:
    """Draws the tokens of one completion, and remembers what that needs.

    `prompt` counts for the repetition penalty; `constraint` is the grammar of `params` at work.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        self.params, self.constraint = params, constraint
        self._generator = None if params.greedy else params.generator()
        self._prompt = torch.tensor(prompt if params.repetition_penalty != 1 else ()).long()
        self._output = torch.empty(0, dtype=torch.long)

    def draw(self, logits: Tensor) -> int:
        """The next token from logits (V,), fp32, of the ids that may be drawn."""
        if not self.params.plain:
            logits = adjust(logits, self._prompt, self._output, self.params)
        if self.constraint is not None:
            logits = self.constraint.mask(logits)
        if self._generator is None:
            return int(logits.argmax())
        return sample(logits, self.params, self._generator)

    def accept(self, token: int) -> None:
        """`token` has been drawn, and is part of the output."""
        if not self.params.unpenalized:
            self._output = torch.cat([self._output, torch.tensor([token])])
        if self.constraint is not None:
            self.constraint.accept(token)

    @property
    def complete(self) -> bool:
        """Whether a grammar lets nothing follow."""
        return self.constraint is not None and self.constraint.complete


def adjust(logits: Tensor, prompt: Tensor, output: Tensor, params: SamplingParams) -> Tensor:
    """Bias and penalties on logits (V,), given the ids of prompt and output so far."""
    logits = bias(logits, params.logit_bias)
    logits = penalize(logits, torch.cat([prompt, output]), params.repetition_penalty)
    return discourage(logits, output, params.presence_penalty, params.frequency_penalty)


def bias(logits: Tensor, biases: Mapping[int, float]) -> Tensor:
    """Add to the logits (V,) of some tokens."""
    if not biases:
        return logits
    values = torch.tensor(list(biases.values()), dtype=logits.dtype)
    return logits.index_add(0, torch.tensor(list(biases)), values)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the positive and multiply the negative logits of `seen` tokens by `penalty`."""
    if penalty == 1.0:
        return logits
    values = logits[seen]
    return logits.index_put((seen,), torch.where(values > 0, values / penalty, values * penalty))


def discourage(logits: Tensor, output: Tensor, presence: float, frequency: float) -> Tensor:
    """Take from each token's logit presence, if it is in the output, and frequency times how often.

    The prompt does not count, as in the OpenAI API.
    """
    if presence == frequency == 0:
        return logits
    tokens, counts = output.unique(return_counts=True)
    return logits.index_add(0, tokens, -(presence + frequency * counts.to(logits.dtype)))


def sample(logits: Tensor, params: SamplingParams, generator: torch.Generator) -> int:
    """Draw from logits (V,) at a temperature above 0."""
    tokens, probabilities = candidates(logits, params)
    # Inversion: one number, however many candidates there are, and no token of probability 0.
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    target = torch.rand(1, generator=generator, dtype=torch.float64) * sums[-1]
    place = int(torch.searchsorted(sums, target, right=True))
    return int(tokens[min(place, len(tokens) - 1)])


def candidates(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn and their probabilities, before these sum to 1 again.

    Top-p keeps the smallest set whose probability reaches p, and so always one token; min-p those
    with that share of the likeliest's probability.
    """
    V = logits.numel()
    logits = logits / params.temperature
    if params.top_k == 0 and params.top_p == 1.0:
        tokens, probabilities = torch.arange(V), logits.softmax(-1)
    else:
        tokens, probabilities = _likeliest(logits, params.top_k, params.top_p)
    if params.min_p > 0:
        enough = probabilities >= params.min_p * probabilities.max()
        tokens, probabilities = tokens[enough], probabilities[enough]
    return tokens, probabilities


def _likeliest(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Top-k, then top-p, the likeliest token first."""
    V = logits.numel()
    # To sort the whole vocabulary costs as much as a third of a decode step of the 0.5B, and
    # the nucleus nearly always lies among the first thousand.
    kept = min(top_k or V, V)
    for size in sorted({min(kept, 1024), kept}):
        values, tokens = logits.topk(size)
        # Under top-k the rest has no probability; without it, the rest counts in the sum.
        total = (values if top_k else logits).logsumexp(-1)
        probabilities = (values - total).exp()
        before = probabilities.cumsum(-1) - probabilities
        if size == kept or before[-1] >= top_p:
            break
    inside = before < top_p
    inside[0] = True
    if top_p == 1.0:  # a sum that rounds to 1 early must not end the top k
        inside[:] = True
    return tokens[inside], probabilities[inside]
