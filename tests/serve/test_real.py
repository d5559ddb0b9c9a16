"""The real checkpoint, served: its own template, tools, and the same answer however it is asked."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.real, pytest.mark.slow]

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
FRANCE: Any = {
    "model": "model",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "temperature": 0,
}


@pytest.fixture(scope="module")
def client(real_checkpoint: Path) -> Iterator[Any]:
    openai = pytest.importorskip("openai")
    command = [sys.executable, "-m", "qwen2.cli", "serve", str(real_checkpoint), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--served-name", "model", "--kv-tokens", "8192"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    url = process.stdout.readline().split("served at ")[1].split(",")[0]
    yield openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
    process.terminate()
    assert process.wait(60) == 0


def test_a_fact(client: Any) -> None:
    answer = client.chat.completions.create(**FRANCE)
    assert answer.choices[0].message.content == "The capital of France is Paris."
    assert answer.choices[0].finish_reason == "stop"
    pieces = [
        chunk.choices[0].delta.content
        for chunk in client.chat.completions.create(**FRANCE, stream=True)
    ]
    assert "".join(filter(None, pieces)) == "The capital of France is Paris."
    response = client.responses.create(
        input="What is the capital of France?", temperature=0, instructions="Be brief."
    )
    assert "Paris" in response.output_text


def test_it_calls_a_tool(client: Any) -> None:
    """This small coder writes the bare JSON unless it is told to begin with the tag."""
    question = "What is the weather in Oslo? Begin your answer with <tool_call>"
    messages: list[Any] = [{"role": "user", "content": question}]
    settings = {"model": "model", "tools": [WEATHER], "temperature": 0, "max_tokens": 100}
    answer = client.chat.completions.create(messages=messages, **settings)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].message.content is None
    assert answer.choices[0].finish_reason == "tool_calls"
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    chunks = client.chat.completions.create(messages=messages, **settings, stream=True)
    deltas = [d for c in chunks for d in c.choices[0].delta.tool_calls or []]
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    messages += [
        answer.choices[0].message,
        {"role": "tool", "tool_call_id": call.id, "content": "4 degrees and rain"},
        {"role": "user", "content": "Say in a sentence what the weather is."},
    ]
    answer = client.chat.completions.create(messages=messages, model="model", temperature=0)
    assert "rain" in answer.choices[0].message.content


def forced(client: Any, **settings: Any) -> Any:
    """An answer that a grammar holds."""
    return client.chat.completions.create(model="model", temperature=0, max_tokens=100, **settings)


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_a_tool_that_must_be_called_is_called(client: Any, choice: Any) -> None:
    messages = [{"role": "user", "content": "Name a prime."}]
    answer = forced(
        client, messages=messages, tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False
    )
    (call,) = answer.choices[0].message.tool_calls
    assert list(json.loads(call.function.arguments)) == ["city"]
    assert answer.choices[0].finish_reason == "tool_calls"


def test_an_answer_follows_a_schema(client: Any) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string"}, "inhabitants": {"type": "integer"}},
        "required": ["city", "inhabitants"],
        "additionalProperties": False,
    }
    messages = [{"role": "user", "content": "Tell me of the capital of France, as JSON."}]
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": schema}}
    answer = forced(client, messages=messages, response_format=wanted)
    found = json.loads(answer.choices[0].message.content)
    assert found["city"] == "Paris"
    assert isinstance(found["inhabitants"], int)
    answer = forced(client, messages=messages, response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)
