"""`POST /v1/responses`: text in, text out; nothing is stored.

What of this API needs a store (previous_response_id, conversation, background), files or other
models is refused.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field, field_validator, model_validator
from starlette.responses import Response

from qwen2.serve import flight as flights
from qwen2.serve.conversation import format_grammar
from qwen2.serve.errors import ApiError, Json
from qwen2.serve.flight import Flight, Job
from qwen2.serve.protocol import (
    BOOKKEEPING,
    MAX_MESSAGES,
    MAX_TOKENS,
    Body,
    JsonSchema,
    Message,
    Part,
    ResponseFormat,
    Sampling,
    StreamOptions,
    joined_text,
)
from qwen2.serve.service import Service, new_id
from qwen2.serve.stream import EventStream, event, whole

DEFAULT_SYSTEM = "You are a helpful assistant."  # Qwen2's own


class InputMessage(Part):
    """A message of the input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, content: Any) -> Any:
        return joined_text(content, ("input_text", "output_text"))


class TextFormat(Part):
    """What the answer is to be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    name: str | None = None

    @model_validator(mode="after")
    def _check(self) -> TextFormat:
        if self.type == "json_schema" and self.schema_ is None:
            raise ValueError("json_schema: the schema is missing")
        return self


class TextOptions(Part):
    """How the answer's text is to be."""

    format: TextFormat | None = None
    verbosity: Literal["medium"] | None = None  # another would change the answer


class InputBody(Body):
    """The part of a request that the model is shown."""

    ignored: ClassVar[frozenset[str]] = BOOKKEEPING | {"parallel_tool_calls"}
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        **dict.fromkeys(
            ("access_programs", "background_options", "conversation", "image", "moderation"), ()
        ),
        **dict.fromkeys(("max_tool_calls", "previous_response_id", "prompt", "personality"), ()),
        "background": (False,),
        "context_management": ([],),
        "include": ([],),
        "reasoning": ({}, {"effort": "none"}),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: str | Annotated[list[InputMessage], Field(max_length=MAX_MESSAGES)] | None = None
    instructions: str | None = None
    text: TextOptions | None = None

    def messages(self) -> list[Message]:
        """The conversation: instructions, then input; the model may also speak first."""
        given = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else []
        if isinstance(self.input, list):
            given = [{"role": each.role, "content": each.content} for each in self.input]
        if self.instructions is not None or not given:
            system = DEFAULT_SYSTEM if self.instructions is None else self.instructions
            given.insert(0, {"role": "system", "content": system})
        return [Message.model_validate(each) for each in given]


class ResponseRequest(InputBody):
    """`POST /v1/responses`."""

    max_output_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None


def router(service: Service) -> APIRouter:
    """The routes."""
    routes = APIRouter()

    @routes.post("/v1/responses")
    async def create_response(body: ResponseRequest, request: Request) -> Response:
        """Answer an input."""
        model = service.check_model(body.model)

        async def launch() -> Flight:
            return await service.launch(lambda: _jobs(service, body), request.state.caller)

        if body.stream:
            flight = await launch()
            answer = Answer(body, model, flight)
            return EventStream(answer.events(), flight.cancel)

        async def work() -> Response:
            answer = Answer(body, model, await launch())
            async for _ in answer.events():
                pass
            return Json(answer.shown("completed"))

        return await whole(request, work())

    @routes.post("/v1/responses/input_tokens")
    async def count_input_tokens(body: InputBody) -> Response:
        """How many tokens an input has."""
        service.check_model(body.model)
        ids = await service.prepare(lambda: service.encode_chat(body.messages(), None))
        return Json({"object": "response.input_tokens", "input_tokens": len(ids)})

    return routes


def _jobs(service: Service, body: ResponseRequest) -> list[Job]:
    prompt = service.encode_chat(body.messages(), None)
    sampling = Sampling(temperature=body.temperature, top_p=body.top_p)
    grammar = None
    if body.text is not None and body.text.format is not None:
        wanted = body.text.format
        schema = JsonSchema(schema=wanted.schema_)
        grammar = format_grammar(ResponseFormat(type=wanted.type, json_schema=schema))
    params = service.sampling(sampling, prompt, body.max_output_tokens, grammar)
    return [Job(prompt, each) for each in params]


class Answer:
    """A response as it grows; `events` tells of every step, `shown` is the whole."""

    def __init__(self, body: ResponseRequest, model: str, flight: Flight) -> None:
        self._body, self._model, self._flight = body, model, flight
        self._id, self._item_id = new_id("resp_"), new_id("msg_")
        self._created = int(time.time())
        self._text = ""
        self._cut = False
        self._number = 0

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream; the flight is over when they end.

        Raises:
            ApiError: the request has failed.
        """
        place = {"item_id": self._item_id, "output_index": 0, "content_index": 0}
        try:
            yield self._event("created", response=self.shown("in_progress"))
            yield self._event("in_progress", response=self.shown("in_progress"))
            yield self._event(
                "output_item.added", output_index=0, item=self._item("in_progress", [])
            )
            yield self._event("content_part.added", **place, part=self._part())
            async for _, output in self._flight:
                if error := flights.failure(output):
                    raise error
                self._text += output.text
                self._cut = output.finish_reason == "length"
                if output.text:
                    yield self._event("output_text.delta", **place, delta=output.text, logprobs=[])
            yield self._event("output_text.done", **place, text=self._text, logprobs=[])
            yield self._event("content_part.done", **place, part=self._part())
            whole = self.shown("completed")
            yield self._event("output_item.done", output_index=0, item=whole["output"][0])
            yield self._event(whole["status"], response=whole)
        except ApiError as error:
            failed = {"code": "server_error", "message": error.message}
            if not self._body.stream:
                raise
            yield self._event("failed", response={**self.shown("failed"), "error": failed})
        finally:
            self._flight.cancel()

    def shown(self, status: str) -> dict[str, Any]:
        """The whole response; a completed one that was cut is incomplete."""
        if status == "completed" and self._cut:
            status = "incomplete"
        body, over = self._body, status != "in_progress"
        output_format = {"type": "text"}
        if body.text is not None and body.text.format is not None:
            output_format = body.text.format.model_dump(exclude_none=True, by_alias=True)
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._cut else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": {},
            "model": self._model,
            "output": [self._item(status, [self._part()])] if over else [],
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": 1.0 if body.temperature is None else body.temperature,
            "text": {"format": output_format},
            "tool_choice": "auto",
            "tools": [],
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "truncation": "disabled",
            "usage": self._usage() if over else None,
        }

    def _item(self, status: str, content: list[Any]) -> dict[str, Any]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": "incomplete" if status == "failed" else status,
            "content": content,
        }

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self._text, "annotations": [], "logprobs": []}

    def _usage(self) -> dict[str, Any]:
        request = self._flight.requests[0]
        prompt, output = len(request.prompt), len(request.output)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {
                "cached_tokens": request.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + output,
        }

    def _event(self, kind: str, **data: Any) -> bytes:
        name = f"response.{kind}"
        number, self._number = self._number, self._number + 1
        return event({"type": name, "sequence_number": number, **data}, name)
