"""The parser of tool calls: JSON-aware, the same however the text is cut, nothing lost."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.serve.json_scan import ObjectScanner
from qwen2.serve.tools import Arguments, Broken, CallStart, Content, Event, ToolCallParser


def parse(*pieces: str) -> list[Event]:
    """Events of the pieces, neighbours of a kind joined."""
    parser = ToolCallParser()
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.finish()
    joined: list[Event] = []
    for event in events:
        last = joined[-1] if joined else None
        if isinstance(event, Content) and isinstance(last, Content):
            joined[-1] = Content(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments):
            joined[-1] = Arguments(last.index, last.text + event.text)
        else:
            joined.append(event)
    return joined


def call(name: str = "f", arguments: Any = None) -> str:
    body = json.dumps({"name": name, "arguments": arguments or {}})
    return f"<tool_call>\n{body}\n</tool_call>"


def test_text_alone() -> None:
    assert parse("a < b <tool", " x\n") == [Content("a < b <tool x\n")]


def test_a_call_after_text() -> None:
    assert parse("Let me see.\n" + call("f", {"a": 1})) == [
        Content("Let me see."),
        CallStart(0, "f"),
        Arguments(0, '{"a": 1}'),
    ]


def test_several_calls_and_text_behind() -> None:
    assert parse(f"{call('f')}\n{call('g', {'b': [2]})}\n\ndone") == [
        CallStart(0, "f"),
        Arguments(0, "{}"),
        CallStart(1, "g"),
        Arguments(1, '{"b": [2]}'),
        Content("\n\ndone"),
    ]


@pytest.mark.parametrize(
    "text", ["</tool_call>", '"} </tool_call>', "<tool_call>{}", "\\", "\n\t", "{[", "\u2028é漢"]
)
def test_strings_may_hold_anything(text: str) -> None:
    events = parse(call("f", {"text": text, text: 1}) + call("g"))
    assert events[0] == CallStart(0, "f")
    assert isinstance(events[1], Arguments)
    assert json.loads(events[1].text) == {"text": text, text: 1}
    assert events[2:] == [CallStart(1, "g"), Arguments(1, "{}")]


def test_arguments_come_as_they_are_written() -> None:
    parser = ToolCallParser()
    assert parser.feed('<tool_call>{"name": "f", "arguments": {"a"') == [
        CallStart(0, "f"),
        Arguments(0, '{"a"'),
    ]
    assert parser.feed(": 1") == [Arguments(0, ": 1")]
    assert parser.feed("}}") == [Arguments(0, "}")]
    assert parser.calls == 1
    assert parser.feed("\n</tool_call>") == []


def test_name_behind_the_arguments() -> None:
    text = '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>'
    assert parse(text) == [CallStart(0, "f"), Arguments(0, '{"a": 1}')]


@pytest.mark.parametrize(
    ("body", "arguments"),
    [
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"name": "f", "arguments": "{\\"a\\": 1}"}', '{"a": 1}'),
    ],
)
def test_other_ways_to_write_arguments(body: str, arguments: str) -> None:
    assert parse(f"<tool_call>{body}</tool_call>") == [CallStart(0, "f"), Arguments(0, arguments)]


def test_a_closing_tag_may_be_missing_at_the_end() -> None:
    assert parse('<tool_call>{"name": "f"}') == [CallStart(0, "f"), Arguments(0, "{}")]


@pytest.mark.parametrize(
    "body",
    [
        "no JSON",
        "[1]",
        '{"name": 3, "arguments": {}}',
        '{"name": ""}',
        '{"arguments": {}}',
        '{"name": "f", "arguments": [1]}',
        '{"name": "f", "arguments": "no object"}',
        "{'name': 'f'}",
        '{"name": "f\n"}',
        '{"name": "\\x"}',
        '{"name": "f", }',
        '{"name": "f", "other": 01}',
        '{"a":' + "[" * 100,
        '{"name": "f", "other": ' + "9" * 5000 + "}",
        '{"name": "f", "name": "g"}',
    ],
)
def test_what_is_no_call_is_content_to_the_letter(body: str) -> None:
    text = f"a \n<tool_call> {body} </tool_call> b"
    assert parse(text) == [Content(text)]


def test_a_call_that_breaks_late_is_taken_back() -> None:
    start = ' <tool_call>{"name": "f", "arguments": {"a": '
    for rest in ("oops}}</tool_call>", ""):
        assert parse(start + rest) == [
            CallStart(0, "f"),
            Arguments(0, '{"a": '),
            Broken(0, start),
            *([Content(rest)] if rest else []),
        ]


def test_a_call_behind_a_broken_one() -> None:
    events = parse(f"<tool_call>{call('g')}")
    assert events == [Content("<tool_call>"), CallStart(0, "g"), Arguments(0, "{}")]


FRAGMENTS = [
    *("<tool_call>", "</tool_call>", "<tool", "\n", " ", "a", "é", '{"name": "f", "arguments": '),
    *('{"a": 1}', "}", "{", '"', "\\", "[", "]", ",", ":", "12", "true", '"name"', "</", call("g")),
    call("f", {"x": "</tool_call>"}),
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join), st.data())
def test_cuts_change_nothing(text: str, data: st.DataObject) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=8).map(sorted))
    pieces = [text[a:b] for a, b in pairwise([0, *cuts, len(text)])]
    assert parse(*pieces) == parse(text) == parse(*text)


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join))
def test_events_account_for_the_text(text: str) -> None:
    """What is not a complete call, a tag or white space around one, is content."""
    events = parse(text)
    broken = {event.index for event in events if isinstance(event, Broken)}
    for event in events:
        if isinstance(event, Arguments) and event.index not in broken:
            assert isinstance(json.loads(event.text), dict)
    given_back = "".join(e.text for e in events if isinstance(e, Content | Broken))
    complete = [e for e in events if isinstance(e, CallStart) and e.index not in broken]
    if not complete:
        assert given_back == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=12,
)


@given(st.dictionaries(st.text(max_size=3), JSON, max_size=3), st.booleans(), st.text(max_size=5))
def test_the_scanner_ends_where_the_object_ends(
    value: dict[str, Any], ascii_: bool, tail: str
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_)
    if "Infinity" in text:
        return
    scanner = ObjectScanner()
    assert scanner.feed(text + tail) == len(text)
    assert scanner.done
    assert not scanner.broken
    assert {k: json.loads(scanner.text[a:b]) for k, (a, b) in scanner.values.items()} == value


@given(st.text(alphabet='{}[]",:\\u0tre1.- \n', max_size=20))
def test_the_scanner_agrees_with_the_json_module(tail: str) -> None:
    text = "{" + tail
    scanner = ObjectScanner()
    taken = scanner.feed(text)
    if scanner.done:
        assert isinstance(json.loads(text[:taken]), dict)
    else:
        try:
            json.loads(text)
        except ValueError:
            return
        pairs = json.loads(text, object_pairs_hook=list)
        assert len(dict(pairs)) < len(pairs)  # only a key that comes twice
