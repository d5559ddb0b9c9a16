"""Schemas that are made to break whoever compiles them: no 5xx, the next request succeeds, memory
is flat once what is kept of a grammar is kept."""

from __future__ import annotations

from typing import Any

import raw

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Hi"}]


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema, "minItems": 2}
    return schema


HOSTILE: dict[str, Any] = {
    "no such reference": {"$ref": "#/$defs/none"},
    "a reference to a file": {"$ref": "file:///etc/passwd"},
    "a reference elsewhere": {"$ref": "http://127.0.0.1:9/schema.json"},
    "a broken pattern": {"type": "string", "pattern": "(("},
    "an exponential pattern": {"type": "string", "pattern": "^((a|a)*|(a*)*)*b{500}{500}$"},
    "a huge repetition": {"type": "string", "minLength": 10**9},
    "a huge array": {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
    "many choices": {"enum": [f"{'x' * 50}{i}" for i in range(50_000)]},
    "a loop": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
    "doubling": {"allOf": [deep(20)] * 200},
    "nothing": {"not": {}},
}


def ask_all(served: Any) -> None:
    """Each is refused, at once or when it comes out; or, if it can be followed, followed."""
    for name, schema in HOSTILE.items():
        for extra in (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": schema}}],
                "tool_choice": "required",
            },
        ):
            body = {"messages": HELLO, "max_tokens": 5, **extra}
            response = served.client.post(CHAT, json=body)
            assert response.status_code in (200, 400), (name, response.text)
            answer = served.post(CHAT, messages=HELLO, max_tokens=1, ignore_eos=True)
            assert answer["usage"]["completion_tokens"] == 1, name


def test_hostile_schemas(served: Any) -> None:
    raw.assert_memory_settles(lambda: ask_all(served))
    served.wait_until_idle()
