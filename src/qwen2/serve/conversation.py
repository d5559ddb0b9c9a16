"""A request's messages, tools and wanted form, as the chat template and the engine take them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from qwen2.common.errors import UserError
from qwen2.inference import Grammar
from qwen2.serve.errors import ApiError
from qwen2.serve.protocol import ChatRequest, Message, NamedTool, ResponseFormat, Tool
from qwen2.serve.tools import CLOSE, OPEN

NEWLINE = "\n"


def for_template(message: Message) -> dict[str, Any]:
    """A message for the chat template, which wants arguments of calls as objects, not as JSON text.

    Raises:
        UserError: the arguments are no JSON object.
    """
    role = "system" if message.role == "developer" else message.role
    shown: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.tool_calls:
        shown["tool_calls"] = [
            {
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments),
                },
            }
            for call in message.tool_calls
        ]
    return shown


def _arguments(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise UserError("tool_calls: the arguments of a call are to be a JSON object, as text")
    return value


def shown_tool(tool: Tool) -> dict[str, Any]:
    """What the model is shown of a tool; `strict` is not for it."""
    return {
        "type": "function",
        "function": tool.function.model_dump(exclude_unset=True, exclude={"strict"}),
    }


def offered_tools(body: ChatRequest) -> Sequence[Tool]:
    """The tools that the model is shown: none where it is to call none."""
    return () if body.tool_choice == "none" else body.tools or ()


def wanted_grammar(body: ChatRequest, special_tokens: Any) -> Grammar | None:
    """The grammar that a chat's answer must follow, if any.

    Raises:
        ApiError: a JSON answer and tools that may be called, which exclude each other.
    """
    tools = offered_tools(body)
    grammar = format_grammar(body.response_format)
    if grammar and tools:
        raise ApiError(
            400,
            "a JSON response_format goes with tool_choice='none' only",
            param="response_format",
        )
    if isinstance(body.tool_choice, NamedTool):
        chosen = [tool for tool in tools if tool.function.name == body.tool_choice.function.name]
        return call_grammar(chosen, several=False, special=OPEN in special_tokens)
    if body.tool_choice == "required":
        several = body.parallel_tool_calls is not False
        return call_grammar(tools, several, special=OPEN in special_tokens)
    return grammar


def format_grammar(wanted: ResponseFormat | None) -> Grammar | None:
    """The grammar of a response format."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "json_object":
        return Grammar(kind="json_schema", text='{"type": "object"}')
    assert wanted.json_schema is not None
    return Grammar(kind="json_schema", text=json.dumps(wanted.json_schema.schema_))


def call_grammar(tools: Sequence[Tool], several: bool, special: bool) -> Grammar:
    """One call of one of `tools`, or more, in the Hermes form.

    Args:
        tools: the functions; arguments follow their parameters' schemas.
        several: more calls may follow.
        special: the tags are tokens of the vocabulary, as in Qwen2.5's, not text.
    """
    begin, end = (OPEN, CLOSE) if special else (json.dumps(OPEN), json.dumps(CLOSE))
    names = [f"call_{index}" for index in range(len(tools))]
    rules = [f"start: call{' (NEWLINE call)*' if several else ''}"]
    rules += [f"NEWLINE: {json.dumps(NEWLINE)}", f"call: {' | '.join(names)}"]
    for name, tool in zip(names, tools, strict=True):
        # A schema of its own for each, for its references begin at its root.
        before = json.dumps(f'\n{{"name": "{tool.function.name}", "arguments": ')
        rules.append(f"{name}: {begin} {before} {name}_arguments {json.dumps('}' + NEWLINE)} {end}")
        schema = tool.function.parameters or {"type": "object"}
        rules.append(f"{name}_arguments: %json {json.dumps(schema)}")
    return Grammar(kind="lark", text="\n".join(rules) + "\n")
