"""`POST /v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from qwen2.inference import Output
from qwen2.serve import flight as flights
from qwen2.serve.conversation import offered_tools, wanted_grammar
from qwen2.serve.errors import Json
from qwen2.serve.flight import Flight, Job
from qwen2.serve.logprobs import chat_logprobs
from qwen2.serve.protocol import ChatRequest
from qwen2.serve.service import Service, new_id, usage
from qwen2.serve.stream import DONE, EventStream, event, whole
from qwen2.serve.tools import Arguments, Broken, CallStart, Content, Event, ToolCallParser

Delta = dict[str, Any]


def router(service: Service) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation."""
        model = service.check_model(body.model)

        async def launch() -> Flight:
            return await service.launch(lambda: _jobs(service, body), request.state.caller)

        if body.stream:
            flight = await launch()
            return EventStream(_stream(service, body, model, flight), flight.cancel)
        return await whole(request, _answer(service, body, model, launch))

    return routes


def _jobs(service: Service, body: ChatRequest) -> list[Job]:
    prompt = service.encode_chat(body.messages, offered_tools(body))
    params = service.sampling(
        body,
        prompt,
        body.max_completion_tokens or body.max_tokens,
        wanted_grammar(body, service.tokenizer.special_tokens),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return [Job(prompt, each) for each in params]


class Choice:
    """One of a chat's answers as it grows: outputs go in, deltas come out; `message` is the whole.

    A call that turns out to be none is taken out of the whole and its text put back into the
    content. What has been streamed can't be taken back: there the content follows it.
    """

    def __init__(self, service: Service, body: ChatRequest) -> None:
        self._tokenizer = service.tokenizer
        self._parser = ToolCallParser() if offered_tools(body) else None
        self._only_one_call = body.parallel_tool_calls is False
        self._with_logprobs = bool(body.logprobs)
        self._content: list[str] = []
        self._calls: dict[int, dict[str, Any]] = {}
        self.finish_reason: str | None = None
        self.logprobs: dict[str, Any] | None = (
            {"content": [], "refusal": None} if body.logprobs else None
        )

    def add(self, output: Output) -> list[tuple[Delta, dict[str, Any] | None]]:
        """What an output adds: deltas, the first of them with the logprobs of its tokens.

        Raises:
            ApiError: the request has failed.
        """
        if self.complete:
            return []
        if error := flights.failure(output):
            raise error
        events = self._events(output)
        deltas = [delta for each in events for delta in self._apply(each)]
        if self.complete:
            self.finish_reason = "tool_calls"
        elif output.finish_reason is not None:
            called = self._parser is not None and self._parser.calls > 0
            stopped = output.finish_reason == "stop"
            self.finish_reason = "tool_calls" if called and stopped else output.finish_reason
        logprobs = None
        if self.logprobs is not None and output.logprobs:
            shown = chat_logprobs(self._tokenizer, output.logprobs)
            self.logprobs["content"] += shown
            logprobs = {"content": shown, "refusal": None}
            deltas = deltas or [{"content": ""}]
        return [(delta, None if i else logprobs) for i, delta in enumerate(deltas)]

    @property
    def complete(self) -> bool:
        """Whether nothing more is wanted: the one call that is allowed is there."""
        return self._only_one_call and self._parser is not None and self._parser.calls > 0

    @property
    def message(self) -> dict[str, Any]:
        """The whole message."""
        content = "".join(self._content)
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content if content or not self._calls else None,
            "refusal": None,
        }
        if self._calls:
            message["tool_calls"] = list(self._calls.values())
        return message

    def _events(self, output: Output) -> list[Event]:
        if self._parser is None:
            return [Content(output.text)] if output.text else []
        events = self._parser.feed(output.text)
        if output.finish_reason is not None:
            events += self._parser.finish()
        return events

    def _apply(self, event: Event) -> list[Delta]:
        match event:
            case Content(text):
                if self.complete:
                    return []
                self._content.append(text)
                return [{"content": text}]
            case CallStart(index, name):
                if self._only_one_call and self._calls:
                    return []
                function = {"name": name, "arguments": ""}
                call = {"id": new_id("call_"), "type": "function", "function": function}
                self._calls[index] = call
                return [{"tool_calls": [{**call, "index": index, "function": dict(function)}]}]
            case Arguments(index, text):
                if index not in self._calls:
                    return []
                self._calls[index]["function"]["arguments"] += text
                return [{"tool_calls": [{"index": index, "function": {"arguments": text}}]}]
            case Broken(index, text):
                self._calls.pop(index, None)
                self._content.append(text)
                return [{"content": text}]


async def _answer(service: Service, body: ChatRequest, model: str, launch: Any) -> Response:
    flight: Flight = await launch()
    try:
        choices = [Choice(service, body) for _ in flight.requests]
        async for index, output in flight:
            choices[index].add(output)
            if choices[index].complete:
                flight.cancel(index)
    finally:
        flight.cancel()
    return Json(
        {
            **_head(service, model, "chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": choice.message,
                    "logprobs": choice.logprobs,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": usage(flight, len(choices)),
        }
    )


async def _stream(
    service: Service, body: ChatRequest, model: str, flight: Flight
) -> AsyncIterator[bytes]:
    head = _head(service, model, "chat.completion.chunk")
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    if with_usage:
        head["usage"] = None
    choices = [Choice(service, body) for _ in flight.requests]
    begun: set[int] = set()

    def chunk(index: int, delta: Delta, logprobs: Any = None, finish: str | None = None) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**head, "choices": [choice]})

    async for index, output in flight:
        choice = choices[index]
        if choice.finish_reason is not None:
            continue
        deltas = choice.add(output)
        if index not in begun:
            begun.add(index)
            yield chunk(index, {"role": "assistant", "content": ""})
        for delta, logprobs in deltas:
            yield chunk(index, delta, logprobs)
        if choice.finish_reason is not None:
            yield chunk(index, {}, finish=choice.finish_reason)
            flight.cancel(index)
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(flight, len(choices))})
    yield DONE


def _head(service: Service, model: str, kind: str) -> dict[str, Any]:
    return {
        "id": new_id("chatcmpl-"),
        "object": kind,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": service.fingerprint,
    }
