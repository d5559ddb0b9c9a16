"""What is made of a request's tools for the engine: a grammar that llguidance reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qwen2.serve.conversation import call_grammar, shown_tool
from qwen2.serve.protocol import Tool
from qwen2.serve.tools import CallStart, ToolCallParser

llguidance = pytest.importorskip("llguidance")

PARAMETERS = {
    "f": {
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/number"}},
        "required": ["a"],
        "additionalProperties": False,
        "$defs": {"number": {"type": "integer"}},
    },
    "g-2": None,
}
F = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
G = '<tool_call>\n{"name": "g-2", "arguments": {"x": "</tool_call>"}}\n</tool_call>'


def tool(name: str) -> Tool:
    function = {"name": name, "parameters": PARAMETERS[name], "strict": True}
    return Tool.model_validate({"type": "function", "function": function})


def accepts(text: str, several: bool, names: tuple[str, ...] = ("f", "g-2")) -> bool:
    grammar = call_grammar([tool(name) for name in names], several, special=False)
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, grammar.text)
    assert not matcher.get_error()
    tokens = tokenizer.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def test_calls_in_the_form_that_the_parser_reads() -> None:
    for text, several in ((F, False), (G, False), (F, True), (f"{F}\n{G}\n{F}", True)):
        assert accepts(text, several)
        parser = ToolCallParser()
        started = [e for e in parser.feed(text) if isinstance(e, CallStart)]
        assert len(started) == parser.calls == text.count('"name"')


@pytest.mark.parametrize(
    "text",
    [
        "", "Hello", f"Hello {F}", f"{F}\n{F}", F.replace("1", '"x"'), F.replace('"f"', '"h"'),
        F.replace('{"a": 1}', "{}"), F[:-1],
    ],
)  # fmt: skip
def test_nothing_else(text: str) -> None:
    assert not accepts(text, several=False)


def test_one_function_by_name() -> None:
    assert accepts(F, False, ("f",))
    assert not accepts(G, False, ("f",))


def test_tags_that_are_tokens() -> None:
    text = call_grammar([tool("f")], several=False, special=True).text
    assert "call_0: <tool_call> " in text
    assert " </tool_call>\n" in text


def test_strict_is_not_shown_to_the_model() -> None:
    shown: Any = shown_tool(tool("f"))
    assert json.dumps(shown).startswith('{"type": "function", "function": {"name": "f"')
    assert "strict" not in shown["function"]
