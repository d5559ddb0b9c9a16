"""Judges of quality: an instruct model in this process, or one behind an OpenAI-compatible server.

In process the answer is not drawn: the score is the mean of the digits 0 to 5 by the model's
probabilities of them, which tells more than the likeliest digit and can't be malformed. A server's
answer is parsed strictly; what is no score leaves its text without one.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import httpx
from pydantic import Field, PositiveInt

from qwen2.common.config import Config, one_line
from qwen2.common.errors import UserError
from qwen2.corpus.quality.judge import BEST, Judge, parse_score
from qwen2.corpus.quality.labels import TextSource
from qwen2.inference import Engine, SamplingParams
from qwen2.inference.request import TokenLogprob
from qwen2.pipeline.quality.head import fingerprint
from qwen2.tokenizer.chatml import ChatTemplate

TOGETHER = 16  # prompts that an engine is given at a time; their scores are kept when all are there
ALTERNATIVES = 50  # likeliest tokens among which the digits are looked for
FORCED = 100.0  # bias of a digit: no other token is drawn
SECONDS = 120.0  # for one answer
LONGEST_WAIT = 30.0  # seconds between two attempts


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
    """Of one request, before the run stops; it can be taken up again."""


def open_judge(config: JudgeConfig) -> tuple[Judge, str]:
    """The judge, and the name by which its scores are kept.

    Raises:
        UserError: there is no such model.
    """
    if config.endpoint is not None:
        return EndpointJudge(config), f"{config.endpoint} {config.model}"
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

    def __call__(self, prompts: Sequence[str]) -> Iterator[tuple[int, float | None]]:
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


class EndpointJudge:
    """A model behind a server. `transport` stands in for the network in tests."""

    def __init__(
        self,
        config: JudgeConfig,
        transport: httpx.BaseTransport | None = None,
        wait: float = 1.0,
    ) -> None:
        assert config.endpoint is not None
        self.config, self._transport, self._wait = config, transport, wait
        self.url = f"{config.endpoint.rstrip('/')}/chat/completions"

    def __call__(self, prompts: Sequence[str]) -> Iterator[tuple[int, float | None]]:
        """See `Judge`.

        Raises:
            UserError: the server refuses us, or fails again and again.
        """
        key = os.environ.get(self.config.key_variable)
        with (
            httpx.Client(
                headers={"authorization": f"Bearer {key}"} if key else {},
                timeout=SECONDS,
                transport=self._transport,
            ) as client,
            ThreadPoolExecutor(self.config.at_a_time) as pool,
        ):
            asked = {pool.submit(self._ask, client, p): i for i, p in enumerate(prompts)}
            try:
                for answer in as_completed(asked):
                    yield asked[answer], answer.result()
            finally:
                for answer in asked:
                    answer.cancel()

    def _ask(self, client: httpx.Client, prompt: str) -> float | None:
        body = {
            "model": self.config.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": 8,
            "temperature": 0,
        }
        for attempt in range(1, self.config.attempts + 1):
            try:
                response = client.post(self.url, json=body)
                if response.status_code == 200:
                    return parse_score(_content(response))
                problem = (
                    f"status {response.status_code}: {one_line(Exception(response.text))[:200]}"
                )
                if response.status_code < 500 and response.status_code not in (408, 409, 425, 429):
                    break
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                problem = f"{type(error).__name__}: {one_line(error)}"
            if attempt < self.config.attempts:
                # By chance, so that those who failed together do not come again together.
                most = min(self._wait * 2 ** (attempt - 1), LONGEST_WAIT)
                time.sleep(most * random.uniform(0.5, 1.0))
        raise UserError(f"{self.url}: {problem}; run again to go on from what is scored")


def _content(response: httpx.Response) -> str:
    """The text of an answer; empty, which is no score, where there is none."""
    try:
        content: Any = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return ""
    return content if isinstance(content, str) else ""
