"""Judges of quality: an instruct model in this process, or one behind an OpenAI-compatible server.

In process the answer is not drawn: the score is the mean of the digits 0 to 5 by the model's
probabilities of them, which tells more than the likeliest digit and can't be malformed. A server's
answer is parsed strictly; what is no score leaves its text without one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pydantic import Field, PositiveInt

from qwen2.common.config import Config
from qwen2.corpus.quality.judge import BEST, Judge, parse_score
from qwen2.corpus.quality.labels import TextSource
from qwen2.inference import Engine, SamplingParams
from qwen2.inference.request import TokenLogprob
from qwen2.pipeline.quality.head import fingerprint
from qwen2.synthesis import EndpointConfig, EndpointGenerator, Generator, Prompt, Sampling
from qwen2.synthesis.generator import never
from qwen2.tokenizer.chatml import ChatTemplate

TOGETHER = 16  # prompts that an engine is given at a time; their scores are kept when all are there
ALTERNATIVES = 50  # likeliest tokens among which the digits are looked for
FORCED = 100.0  # bias of a digit: no other token is drawn
SECONDS = 120.0  # for one answer
SAMPLING = Sampling(max_tokens=8, temperature=0, top_p=1)


class JudgeConfig(Config):
    """Who judges, and what."""

    model: str
    """MODEL as every command takes it; at an endpoint, its name there."""
    endpoint: str | None = None
    """URL of an OpenAI-compatible server, up to /v1; None: in this process."""
    key_variable: str = "OPENAI_API_KEY"
    """Environment variable with the server's API key; unset, none is sent."""
    texts: tuple[TextSource, ...] = Field(min_length=1)
    characters: PositiveInt = 3000
    """How much of a text the judge sees."""
    at_a_time: PositiveInt = 8
    """Requests to a server at the same time."""
    attempts: PositiveInt = 5
    """Of one request, before its text is left without a score."""

    @property
    def server(self) -> EndpointConfig:
        """The server, as its client wants it."""
        return EndpointConfig(
            url=self.endpoint,
            key_variable=self.key_variable,
            at_a_time=self.at_a_time,
            seconds=SECONDS,
            attempts=self.attempts,
        )


def open_judge(config: JudgeConfig) -> tuple[Judge, str]:
    """The judge, and the name by which its scores are kept.

    Raises:
        UserError: there is no such model, or no server.
    """
    if config.endpoint is not None:
        judge = AnsweringJudge(EndpointGenerator(config.server, config.model))
        return judge, f"{config.endpoint} {config.model}"
    return EngineJudge(Engine(config.model)), fingerprint(config.model)


class EngineJudge:
    """A model in this process; see the module."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self._template = engine, ChatTemplate.of(engine.tokenizer)
        digits = [engine.tokenizer.encode(str(digit)) for digit in range(BEST + 1)]
        self._digits = {ids[0]: digit for digit, ids in enumerate(digits)}
        self._params = SamplingParams(
            max_tokens=1,
            logprobs=min(ALTERNATIVES, engine.vocabulary),
            logit_bias=dict.fromkeys(self._digits, FORCED),
        )

    def __call__(self, prompts: Sequence[str]) -> Iterator[tuple[int, float]]:
        """See `Judge`."""
        for start in range(0, len(prompts), TOGETHER):
            ids = [self._encode(prompt) for prompt in prompts[start : start + TOGETHER]]
            for index, completion in enumerate(self.engine.generate(ids, self._params), start):
                yield index, self._mean(completion.logprobs[0])

    def _encode(self, prompt: str) -> list[int]:
        messages = [{"role": "user", "content": prompt}]
        return self._template.encode(self.engine.tokenizer, messages, add_generation_prompt=True)[0]

    def _mean(self, drawn: TokenLogprob) -> float:
        """The mean digit; the one drawn counts, whether it is among the likeliest tokens or not."""
        logprobs = {drawn.token: drawn.logprob} | dict(drawn.top)
        chances = {
            digit: math.exp(logprobs[token])
            for token, digit in self._digits.items()
            if token in logprobs
        }
        total = sum(chances.values())
        if not total:
            return float(self._digits[drawn.token])
        return sum(digit * chance for digit, chance in chances.items()) / total


class AnsweringJudge:
    """A model that answers in words, of which nothing but a digit counts."""

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    def __call__(self, prompts: Sequence[str]) -> Iterator[tuple[int, float | str]]:
        """See `Judge`.

        Raises:
            UserError: the server refuses us, or answers nobody any more.
        """
        asked = (
            Prompt(index, ({"role": "user", "content": prompt},), SAMPLING, seed=0)
            for index, prompt in enumerate(prompts)
        )
        for index, answer in self._generator.generate(asked, never):
            if answer.error is not None:
                yield index, answer.error
            else:
                score = parse_score(answer.text)
                yield index, f"no digit: {answer.text[:80]!r}" if score is None else score
