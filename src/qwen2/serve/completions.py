"""`POST /v1/completions`: the older form, which log-likelihoods are still asked for in."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from qwen2.inference import Output
from qwen2.inference import Request as EngineRequest
from qwen2.serve import flight as flights
from qwen2.serve.errors import ApiError, Json
from qwen2.serve.flight import Flight, Job
from qwen2.serve.logprobs import CompletionLogprobs
from qwen2.serve.protocol import MAX_PROMPTS, CompletionRequest
from qwen2.serve.service import Service, new_id, usage
from qwen2.serve.stream import DONE, EventStream, event, whole

DEFAULT_MAX_TOKENS = 16  # OpenAI's
MAX_ECHOED = 1_000_000  # logprobs of prompts in one answer: some 50 MB


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue one text or several, each `n` times: choice i*n + j is the j-th of prompt i."""
        model = service.check_model(body.model)

        async def launch() -> Flight:
            return await service.launch(lambda: _jobs(service, body), request.state.caller)

        if body.stream:
            flight = await launch()
            return EventStream(_stream(service, body, model, flight), flight.cancel)
        return await whole(request, _answer(service, body, model, launch))

    return routes


def _jobs(service: Service, body: CompletionRequest) -> list[Job]:
    prompts = service.encode_prompts(body.prompt)
    if len(prompts) * (body.n or 1) > MAX_PROMPTS:
        raise ApiError(400, f"prompts times n: at most {MAX_PROMPTS} in one request", param="n")
    echoed = sum(map(len, prompts)) * ((body.logprobs or 0) + 1) * (body.n or 1)
    if body.echo and body.logprobs is not None and echoed > MAX_ECHOED:
        raise ApiError(400, f"{echoed:,} logprobs of prompts; at most {MAX_ECHOED:,}", param="echo")
    return [
        Job(prompt, params)
        for prompt in prompts
        for params in service.sampling(
            body,
            prompt,
            body.max_tokens or DEFAULT_MAX_TOKENS,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
        )
    ]


class Choice:
    """One completion as it grows: outputs go in, pieces of text with their logprobs come out."""

    def __init__(self, service: Service, body: CompletionRequest, request: EngineRequest) -> None:
        self._service, self._request = service, request
        self._echo = bool(body.echo)  # not yet told
        self._logprobs = (
            CompletionLogprobs(service.tokenizer) if body.logprobs is not None else None
        )
        self.finish_reason: str | None = None

    def add(self, output: Output) -> tuple[str, dict[str, list[Any]] | None]:
        """The text that an output adds, with the prompt before the first, and its logprobs.

        Raises:
            ApiError: the request has failed.
        """
        if error := flights.failure(output):
            raise error
        self.finish_reason = output.finish_reason
        text = output.text
        if self._echo:
            self._echo = False
            text = self._service.tokenizer.decode(self._request.prompt) + text
            known = self._request.prompt_logprobs
            if self._logprobs and known is not None:
                for token, logprob in zip(self._request.prompt, known, strict=True):
                    self._logprobs.add(token, logprob)
        if self._logprobs is None:
            return text, None
        for each in output.logprobs:
            self._logprobs.add(each.token, each)
        return text, self._logprobs.take()


def _shown(index: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}


async def _answer(service: Service, body: CompletionRequest, model: str, launch: Any) -> Response:
    flight: Flight = await launch()
    try:
        choices = [Choice(service, body, request) for request in flight.requests]
        texts = [""] * len(choices)
        logprobs: list[dict[str, list[Any]] | None] = [None] * len(choices)
        async for index, output in flight:
            text, new = choices[index].add(output)
            texts[index] += text
            old = logprobs[index]
            logprobs[index] = new if old is None or new is None else _joined(old, new)
    finally:
        flight.cancel()
    return Json(
        {
            **_head(service, model),
            "choices": [
                _shown(index, texts[index], logprobs[index], choice.finish_reason)
                for index, choice in enumerate(choices)
            ],
            "usage": usage(flight, body.n or 1),
        }
    )


def _joined(old: dict[str, list[Any]], new: dict[str, list[Any]]) -> dict[str, list[Any]]:
    for name, values in new.items():
        old[name] += values
    return old


async def _stream(
    service: Service, body: CompletionRequest, model: str, flight: Flight
) -> AsyncIterator[bytes]:
    head = _head(service, model)
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if with_usage:
        head["usage"] = None
    choices = [Choice(service, body, request) for request in flight.requests]
    async for index, output in flight:
        text, logprobs = choices[index].add(output)
        finish_reason = choices[index].finish_reason
        if text or finish_reason or (logprobs and logprobs["tokens"]):
            yield event({**head, "choices": [_shown(index, text, logprobs, finish_reason)]})
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(flight, body.n or 1)})
    yield DONE


def _head(service: Service, model: str) -> dict[str, Any]:
    return {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": service.fingerprint,
    }
