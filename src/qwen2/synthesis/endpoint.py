"""Answers from an OpenAI-compatible server: bounded concurrency, retries, failures kept apart.

A prompt that the server refuses (400, 413, 422 ...) or that fails again and again is a failure of
its own and ends nothing. A server that refuses us (401, 403, 404) or that answers nobody any more
does: what waited then is asked for when the run is taken up again.
"""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import email.utils
import os
import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import httpx
from pydantic import Field

from qwen2.common.config import Config, one_line
from qwen2.common.errors import UserError
from qwen2.synthesis.generator import Answer, Answering, Prompt, never, well_formed

CONNECT_SECONDS = 10.0
LONGEST_WAIT = 60.0  # seconds between two attempts, when the server says nothing of it
LONGEST_OBEYED = 600.0  # of what Retry-After may ask for
HOPELESS = 16  # prompts in a row that failed, not one answered between: the server is gone
LOOK_SECONDS = 0.2  # between two looks at whether to stop
AGAIN = frozenset({408, 409, 425, 429})  # and all from 500
HINTS = {
    401: "set the environment variable {variable} to its API key",
    403: "the API key in {variable} may not do this",
    404: "is the URL right (it mostly ends in /v1), and the model {model!r} there?",
}


class EndpointConfig(Config):
    """Where a server is and how it is asked. The API key stands in no file."""

    url: str | None = None  # as OpenAI's clients have it: http://host:8000/v1
    key_variable: str = "OPENAI_API_KEY"  # the environment variable that has the API key
    at_a_time: int = Field(default=32, ge=1)
    seconds: float = Field(default=600.0, gt=0)  # for one answer
    attempts: int = Field(default=6, ge=1)
    first_wait: float = Field(default=1.0, gt=0)  # seconds before the second attempt; doubles


class _Attempt(Exception):  # noqa: N818
    """An attempt failed that may be made again, after `wait` seconds if the server says so."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class EndpointGenerator:
    """A model behind an endpoint.

    Raises:
        UserError: nobody is there, the key is wrong, or there is no such model.
    """

    def __init__(self, config: EndpointConfig, model: str) -> None:
        assert config.url is not None
        self.config, self.model = config, model
        key = os.environ.get(config.key_variable)
        self._settings: dict[str, Any] = {
            "base_url": _base(config.url),
            "headers": {"authorization": f"Bearer {key}"} if key else {},
            "timeout": httpx.Timeout(config.seconds, connect=CONNECT_SECONDS, pool=None),
            "limits": httpx.Limits(max_connections=config.at_a_time),
        }
        self._not_before = 0.0  # on time.monotonic: when the server wants to be asked again
        self._check()

    def generate(
        self, prompts: Iterable[Prompt], stopped: Callable[[], object] = never
    ) -> Answering:
        """See `Generator`. Requests proceed only while the next answer is waited for."""
        source = iter(prompts)
        flying: dict[asyncio.Task[Answer], int] = {}
        lost: list[tuple[int, Answer]] = []  # since the last prompt that the server dealt with
        loop = asyncio.new_event_loop()
        client = httpx.AsyncClient(**self._settings)
        try:
            while not stopped():
                while len(flying) < self.config.at_a_time and (p := next(source, None)) is not None:
                    flying[loop.create_task(self._ask(client, p))] = p.index
                if not flying:
                    yield from lost
                    return
                for task in loop.run_until_complete(_finished(flying)):
                    index = flying.pop(task)
                    try:
                        answer = task.result()
                    except _Attempt as error:
                        lost.append((index, Answer.failure(str(error))))
                        if len(lost) == HOPELESS:
                            raise UserError(
                                f"{self.config.url}: {HOPELESS} prompts in a row had no answer, the"
                                f" last one: {error}; run again when it is well"
                            ) from None
                        continue
                    yield from lost
                    lost.clear()
                    yield index, answer
        finally:
            loop.run_until_complete(_drop(flying, client))
            loop.close()

    async def _ask(self, client: httpx.AsyncClient, prompt: Prompt) -> Answer:
        """The answer, or why the server will never give one.

        Raises:
            _Attempt: why the last attempt failed.
            UserError: the server refuses whatever we ask.
        """
        body = self._body(prompt)
        for attempt in range(1, self.config.attempts + 1):
            while (wait := self._not_before - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            try:
                return self._read(await self._post(client, body))
            except _Attempt as error:
                if attempt == self.config.attempts:
                    raise
                if error.wait is not None:  # nobody else should come earlier either
                    self._not_before = time.monotonic() + min(error.wait, LONGEST_OBEYED)
                    continue
                # Not all at the same time again, hence by chance.
                wait = min(self.config.first_wait * 2 ** (attempt - 1), LONGEST_WAIT)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
        raise AssertionError("the last attempt raises or returns")

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
        try:
            # The client's own time limit begins again with every byte that comes.
            async with asyncio.timeout(self.config.seconds):
                return await client.post("chat/completions", json=body)
        except (httpx.TimeoutException, TimeoutError):
            raise _Attempt(f"no answer within {self.config.seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise _Attempt(f"{type(error).__name__}: {one_line(error)}") from None

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        sampling = prompt.sampling
        body: dict[str, Any] = {
            "model": self.model,
            "messages": list(prompt.messages),
            "max_tokens": sampling.max_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": prompt.seed,
        }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if sampling.repetition_penalty != 1.0:
            body["repetition_penalty"] = sampling.repetition_penalty
        return body

    def _read(self, response: httpx.Response) -> Answer:
        """The answer that a response carries; raises as `_ask` does."""
        status = response.status_code
        if status in HINTS:
            raise UserError(self._refusal(response))
        if status in AGAIN or status >= 500:
            raise _Attempt(f"{status}: {_message(response)}", _retry_after(response))
        if status != 200:
            return Answer.failure(f"{status}: {_message(response)}")
        try:
            whole = response.json()
            choice, usage = whole["choices"][0], whole.get("usage") or {}
            text, reason = choice["message"]["content"], choice["finish_reason"]
            asked = int(usage.get("prompt_tokens") or 0)
            drawn = int(usage.get("completion_tokens") or 0)
        except (ValueError, TypeError, LookupError, AttributeError):
            raise _Attempt(f"an answer that is no completion: {response.text[:100]!r}") from None
        if reason not in ("stop", "length", "eos"):
            return Answer.failure(f"it ended by {reason!r}")
        if not isinstance(text, str):
            return Answer.failure("a message without text")
        served_by = "/".join(
            str(whole[name]) for name in ("model", "system_fingerprint") if whole.get(name)
        )
        return Answer(
            well_formed(text),
            "length" if reason == "length" else "stop",
            asked,
            drawn,
            served_by=well_formed(served_by) or None,
        )

    def _check(self) -> None:
        """Ask for the list of models; servers that have none are taken at our word."""
        url = self.config.url
        try:
            with httpx.Client(**self._settings) as client:
                response = client.get("models", timeout=CONNECT_SECONDS)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UserError(
                f"{url}: no server answers there ({one_line(error) or type(error).__name__}); "
                "start it, or correct the URL"
            ) from None
        if response.status_code in (401, 403):
            raise UserError(self._refusal(response))
        names: list[str] = []
        with contextlib.suppress(ValueError, TypeError, LookupError):
            names = [str(entry["id"]) for entry in response.json()["data"]]
        if names and self.model not in names:
            near = difflib.get_close_matches(self.model, names, n=1) or names[:5]
            raise UserError(
                f"{url}: there is no model {self.model!r}, but {', '.join(near)}; "
                "set `model` in the recipe"
            )

    def _refusal(self, response: httpx.Response) -> str:
        status = response.status_code
        hint = HINTS[status].format(variable=self.config.key_variable, model=self.model)
        return f"{self.config.url}: {status}, {_message(response)}; {hint}"


def identity_of_endpoint(model: str, revision: str | None) -> dict[str, Any]:
    """What we know of a model that others serve: where it runs makes no difference."""
    return {"model": model, "revision": revision, "served": True}


async def _finished(flying: Iterable[asyncio.Task[Answer]]) -> list[asyncio.Task[Answer]]:
    """Those that have ended, once there are any or it is time to look at whether to stop."""
    done, _ = await asyncio.wait(flying, timeout=LOOK_SECONDS, return_when=asyncio.FIRST_COMPLETED)
    return list(done)


async def _drop(flying: Iterable[asyncio.Task[Answer]], client: httpx.AsyncClient) -> None:
    for task in flying:
        task.cancel()
    await asyncio.gather(*flying, return_exceptions=True)
    await client.aclose()


def _base(url: str) -> str:
    """The URL to which `models` and the like are added.

    Raises:
        UserError: it is no URL of http.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise UserError(f"endpoint {url!r}: {one_line(error)}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UserError(f"endpoint {url!r}: write it like http://127.0.0.1:8000/v1")
    return f"{url.rstrip('/')}/v1/" if parsed.path in ("", "/") else f"{url.rstrip('/')}/"


def _message(response: httpx.Response) -> str:
    """What the server says of an error, in one line."""
    text = response.text
    with contextlib.suppress(ValueError, TypeError, LookupError):
        text = str(response.json()["error"]["message"])
    return " ".join(text.split())[:300] or response.reason_phrase


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks for: it may give them, or a date."""
    value = response.headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
