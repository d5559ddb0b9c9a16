"""Requests of OpenAI's API, as far as they are served.

Types are strict and numbers have bounds. A field that is not known is refused, with the nearest
name, so that a misspelt setting never passes silently. Of the fields that OpenAI knows and this
server does not act on, those that change nothing about the answer are ignored; those that would are
refused unless they ask for what happens anyway.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_CHOICES = 16  # n
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_PROMPTS = 128  # of one request
MAX_TOOLS = 128
MAX_MESSAGES = 4096
MAX_TOKENS = 2**31 - 1

# Bookkeeping of OpenAI's own service: none of it changes what the model answers.
BOOKKEEPING = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier"}
    | {"prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
)

Index = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class Part(BaseModel):
    """A part of a request: strict types, and no infinite numbers."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class Body(Part):
    """The body of a request; fields that are not known are refused."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    ignored: ClassVar[frozenset[str]] = frozenset()
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {}  # field: values that mean what is so anyway

    model: Annotated[str, Field(max_length=512)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_changes_nothing(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, harmless in cls.refused.items():
            if name in values and values[name] is not None and values[name] not in harmless:
                raise ValueError(f"{name} is not supported by this server")
        drop = cls.ignored | cls.refused.keys()
        return {name: value for name, value in values.items() if name not in drop}


class StreamOptions(Part):
    """What a stream tells besides."""

    include_usage: bool = False


class Sampling(Body):
    """How tokens are drawn; the fields that chat and completions share.

    `top_k`, `min_p`, `repetition_penalty` and `ignore_eos` are not OpenAI's; other servers know
    them by the same names.
    """

    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_TOKENS)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(
        default=None, max_length=MAX_LOGIT_BIASES
    )
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _check_stop(cls, stop: Any) -> Any:
        stops = [stop] if isinstance(stop, str) else stop
        if stops is None:
            return None
        if not isinstance(stops, list) or not all(isinstance(text, str) for text in stops):
            raise ValueError("a string or a list of strings is wanted")
        if len(stops) > MAX_STOPS or not all(0 < len(text) <= MAX_STOP_LENGTH for text in stops):
            raise ValueError(f"at most {MAX_STOPS}, each of 1 to {MAX_STOP_LENGTH} characters")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _check_tokens(cls, biases: dict[str, float] | None) -> dict[str, float] | None:
        for token in biases or ():
            if not re.fullmatch(r"\d{1,9}", token, flags=re.ASCII):
                raise ValueError(f"{token[:50]!r} is no token id")
        return biases

    @model_validator(mode="after")
    def _check_stream_options(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options goes with stream=true only")
        return self


class FunctionCall(Part):
    """A call of a function by the assistant, in the history."""

    name: Name
    arguments: str


class ToolCall(Part):
    """A tool call of the assistant, in the history."""

    id: Annotated[str, Field(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Part):
    """A message: text, or parts of text."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_TOOLS)

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, content: Any) -> Any:
        return content if content is None else joined_text(content, ("text",))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only the assistant calls tools")
        if self.content is None and not self.tool_calls:
            raise ValueError("a message without content")
        return self


def joined_text(content: Any, types: tuple[str, ...]) -> str:
    """Content that is a string, or parts of the types `types` joined.

    Raises:
        ValueError: parts of another type, such as images.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError("a string or a list of parts is wanted")
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in types:
            shown = f"of type {kind[:50]!r}" if isinstance(kind, str) else "without a type"
            raise ValueError(f"a part {shown}; this model reads text only")
        if not isinstance(part.get("text"), str):
            raise ValueError("a part of text without its text")
    return "".join(part["text"] for part in content)


class Function(Part):
    """A function that the model may call."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Part):
    """A tool; functions are all there is."""

    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    """Which function is to be called."""

    name: Name


class NamedTool(Part):
    """The tool that is to be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Part):
    """A schema that the answer follows."""

    name: Annotated[str, Field(max_length=256)] | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")


class ResponseFormat(Part):
    """What the answer is to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.type == "json_schema" and (
            self.json_schema is None or self.json_schema.schema_ is None
        ):
            raise ValueError("json_schema: the schema is missing")
        return self


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    ignored: ClassVar[frozenset[str]] = BOOKKEEPING | {"prediction"}
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {
        "audio": (),
        "chat_template": (),  # a template is a program, and a request brings no programs
        "chat_template_kwargs": ({},),
        "function_call": ("none",),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs goes with logprobs=true only")
        chosen = self.tool_choice
        if chosen == "required" and not self.tools:
            raise ValueError("tool_choice: there are no tools")
        if isinstance(chosen, NamedTool) and chosen.function.name not in {
            tool.function.name for tool in self.tools or ()
        }:
            raise ValueError(f"tool_choice: no tool is called {chosen.function.name!r}")
        return self


Prompts = str | list[str] | list[int] | list[list[int]]


def check_prompts(prompts: Any) -> Any:
    """A prompt or several, as text or as token ids.

    Raises:
        ValueError: anything else.
    """
    if isinstance(prompts, str):
        return prompts
    wanted = "a string, a list of strings, a list of token ids, or a list of such lists is wanted"
    if not isinstance(prompts, list) or not prompts:
        raise ValueError(wanted)
    if all(type(item) is int for item in prompts):
        return prompts
    if len(prompts) > MAX_PROMPTS:
        raise ValueError(f"{len(prompts)} prompts; at most {MAX_PROMPTS} in one request")
    if all(isinstance(item, str) for item in prompts):
        return prompts
    if not all(
        isinstance(item, list) and item and all(type(id_) is int for id_ in item)
        for item in prompts
    ):
        raise ValueError(wanted)
    return prompts


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    ignored: ClassVar[frozenset[str]] = BOOKKEEPING
    refused: ClassVar[dict[str, tuple[Any, ...]]] = {"suffix": ("",)}

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES)

    _check_prompts = field_validator("prompt", mode="before")(check_prompts)

    @model_validator(mode="after")
    def _check_best_of(self) -> Self:
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is supported only where it equals n")
        return self


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    ignored: ClassVar[frozenset[str]] = frozenset({"user"})

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(default=None, ge=1, le=MAX_TOKENS)

    _check_prompts = field_validator("input", mode="before")(check_prompts)


class TokenizeRequest(Body):
    """`POST /tokenize`: of a text, or of a conversation as the model sees it."""

    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    add_generation_prompt: bool = True
    add_special_tokens: bool = True  # as in vLLM: control tokens written in a prompt are read
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages is wanted")
        return self


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    tokens: list[Index]
