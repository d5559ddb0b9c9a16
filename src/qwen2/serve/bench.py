"""Load for a server that speaks OpenAI's API, and what its clients see of it.

Closed loop: so many clients, each with its next request when the last is answered, which shows the
throughput. Open loop: requests arrive at random (Poisson) whether or not others are answered,
which shows how long people wait. There a request's times count from when it was due, so that a
client that is late itself hides nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import httpx
from pydantic import Field, model_validator

from qwen2.common.config import Config, one_line
from qwen2.common.errors import UserError
from qwen2.common.spread import percentiles, spread
from qwen2.inference.bench import random_prompt

SHOWN = 5  # kinds of errors
TIMEOUT = httpx.Timeout(600, connect=10)  # a loaded CPU may take minutes to the first token


class Load(Config):
    """What is sent: `rate` requests a second in the open loop, else `concurrency` at a time."""

    requests: int = Field(default=32, ge=1)
    prompt_tokens: int = Field(default=64, ge=1)
    max_tokens: int = Field(default=64, ge=1)
    concurrency: int | None = Field(default=None, ge=1)
    rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    seed: int = 0

    @model_validator(mode="after")
    def _one_loop(self) -> Self:
        if (self.concurrency is None) == (self.rate is None):
            raise ValueError("give concurrency (closed loop) or rate (open loop), one of the two")
        return self


@dataclass
class Sample:
    """One request, in seconds of the clock; `stamps` are when pieces of its text came."""

    due: float
    stamps: list[float] = field(default_factory=list)
    ended: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0
    error: str | None = None

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces."""
        return [after - before for before, after in itertools.pairwise(self.stamps)]


@dataclass(frozen=True)
class Clock:
    """Time, which tests replace."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep


Send = Callable[[int, Sample], Awaitable[None]]  # the number of the request, and what to fill in


def arrivals(count: int, rate: float, seed: int) -> list[float]:
    """When requests are due, in seconds from the start: a Poisson process."""
    chosen = random.Random(seed)
    return list(itertools.accumulate(chosen.expovariate(rate) for _ in range(count)))


async def drive(
    load: Load,
    send: Send,
    *,
    clock: Clock | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> list[Sample]:
    """Send every request of `load`; `tell` hears how many have ended. A failure is a sample's."""
    clock = clock or Clock()
    samples: list[Sample] = []
    ended = itertools.count(1)

    async def one(number: int, due: float) -> None:
        samples.append(sample := Sample(due))
        try:
            await send(number, sample)
        except (httpx.HTTPError, ServerError) as error:
            sample.error = one_line(error) or type(error).__name__
        sample.ended = clock.now()
        tell(next(ended))

    async with asyncio.TaskGroup() as tasks:
        begun = clock.now()
        if load.rate is not None:
            for number, after in enumerate(arrivals(load.requests, load.rate, load.seed)):
                await clock.sleep(max(0.0, begun + after - clock.now()))
                tasks.create_task(one(number, begun + after))
        else:
            numbers = iter(range(load.requests))

            async def client() -> None:
                for number in numbers:  # shared: each takes the next
                    await one(number, clock.now())

            for _ in range(min(load.concurrency or 1, load.requests)):
                tasks.create_task(client())
    return samples


class ServerError(Exception):
    """A server's answer that is none."""


async def run_load(
    url: str,
    load: Load,
    *,
    key: str | None = None,
    prompts: Sequence[Sequence[int]] | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> list[Sample]:
    """Put `load` on the server at `url`, with random prompts or these in turn.

    Raises:
        UserError: there is no server, or no model in it.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    # Not by way of a proxy that the environment names: the server is measured, not the way there.
    async with httpx.AsyncClient(
        base_url=url.rstrip("/"), headers=headers, timeout=TIMEOUT, limits=limits, trust_env=False
    ) as client:
        model = await _model_of(client)

        async def send(number: int, sample: Sample) -> None:
            if prompts:
                prompt = prompts[number % len(prompts)]
            else:
                prompt = random_prompt(load.prompt_tokens, load.seed, number)
            await _complete(client, model, prompt, load.max_tokens, sample)

        return await drive(load, send, tell=tell)


async def _model_of(client: httpx.AsyncClient) -> str:
    """The first model that the server names."""
    try:
        answer = await client.get("/v1/models")
        answer.raise_for_status()
        return str(answer.json()["data"][0]["id"])
    except httpx.HTTPStatusError as error:
        raise UserError(f"{client.base_url}: /v1/models: {_reason(error.response)}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UserError(f"{client.base_url}: no server there: {one_line(error)}") from None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{client.base_url}: /v1/models does not name a model") from None


async def _complete(
    client: httpx.AsyncClient,
    model: str,
    prompt: Sequence[int],
    max_tokens: int,
    sample: Sample,
) -> None:
    """One streamed completion, whose times and counts go to `sample`."""
    body = {
        "model": model,
        "prompt": list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,  # vLLM's and llama.cpp's name as well as ours
    }
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != httpx.codes.OK:
            await response.aread()
            raise ServerError(_reason(response))
        async for piece in _events(response):
            if "error" in piece:
                raise ServerError(f"{piece['error']}")
            if any(choice.get("text") for choice in piece.get("choices", ())):
                sample.stamps.append(time.perf_counter())
            if usage := piece.get("usage"):
                sample.prompt_tokens = usage["prompt_tokens"]
                sample.tokens = usage["completion_tokens"]


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream of server-sent events.

    Raises:
        ServerError: it ends before it is complete.
    """
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            yield json.loads(data)
        except ValueError:
            raise ServerError(f"not JSON in the stream: {data[:100]}") from None
    raise ServerError("the stream broke off")


def _reason(response: httpx.Response) -> str:
    text = " ".join(response.text.split())
    return f"status {response.status_code}: {text[:200]}"


def measure(
    url: str,
    load: Load,
    runs: int,
    key: str | None = None,
    tell: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """Put `load` on a server `runs` times, with other prompts each time; see `summarise`.

    `tell` hears how many requests have ended. Ctrl-C breaks off what is in flight, which makes the
    server cancel it.
    """
    first = Load(requests=1, prompt_tokens=load.prompt_tokens, max_tokens=8, concurrency=1, seed=-1)
    asyncio.run(run_load(url, first, key=key))
    results = []
    for number in range(runs):
        own = load.model_copy(update={"seed": load.seed + number})

        def tell_all(done: int, before: int = number * load.requests) -> None:
            tell(before + done)

        results.append(asyncio.run(run_load(url, own, key=key, tell=tell_all)))
    return summarise(results)


def summarise(runs: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """What clients saw: speeds by run; times in seconds, of all requests that were answered.

    Raises:
        UserError: none was answered.
    """
    samples = list(itertools.chain(*runs))
    good = [sample for sample in samples if sample.error is None]
    errors = Counter(sample.error for sample in samples if sample.error is not None)
    if not good:
        raise UserError(f"every request failed: {errors.most_common(1)[0][0]}")

    def rate(run: Sequence[Sample], counted: Callable[[Sample], int]) -> float:
        seconds = max(sample.ended for sample in run) - min(sample.due for sample in run)
        return sum(counted(sample) for sample in run if sample.error is None) / seconds

    return {
        "tokens_per_second": spread(rate(run, lambda sample: sample.tokens) for run in runs),
        "requests_per_second": spread(rate(run, lambda _: 1) for run in runs),
        "time_to_first_token": percentiles([s.stamps[0] - s.due for s in good if s.stamps]),
        "inter_token_latency": percentiles([gap for s in good for gap in s.gaps]),
        "request_latency": percentiles([sample.ended - sample.due for sample in good]),
        "requests": len(samples),
        "errors": sum(errors.values()),
        "error_messages": dict(errors.most_common(SHOWN)),
        "prompt_tokens": sum(sample.prompt_tokens for sample in good),
        "generated_tokens": sum(sample.tokens for sample in good),
        "runs": len(runs),
    }


def decode_rate(samples: Sequence[Sample]) -> float:
    """Tokens per second of all clients together while every one of them decodes: what comes after
    the last of their first tokens.

    A piece of text may be several tokens (a character that ends later), so they count by share.
    """
    begun = max(sample.stamps[0] for sample in samples)
    ended = max(sample.stamps[-1] for sample in samples)
    tokens = sum(
        sample.tokens * sum(stamp > begun for stamp in sample.stamps) / len(sample.stamps)
        for sample in samples
    )
    return tokens / (ended - begun)
