"""Tool calls out of generated text, in the Hermes form that Qwen2.5 was trained on.

    text before <tool_call>
    {"name": "f", "arguments": {"a": 1}}
    </tool_call>

`ToolCallParser` takes the text in pieces and gives events; how the text is cut into pieces changes
nothing. A call ends where its JSON ends. Its arguments are passed on as they come, once its name is
known. What turns out to be no call is given back as content, to the letter: `Broken` says so of a
call that had already begun.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from qwen2.serve.json_scan import ObjectScanner

OPEN, CLOSE = "<tool_call>", "</tool_call>"

_SPACE = " \t\n\r"


@dataclass(frozen=True)
class Content:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins; its arguments follow."""

    index: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """More of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class Broken:
    """The call that had begun is none; its text, as the model wrote it."""

    index: int
    text: str


Event = Content | CallStart | Arguments | Broken


class ToolCallParser:
    """Turns generated text into events; `calls` counts those that are complete.

    White space around calls belongs to the form and is dropped; text that may be the beginning of a
    call is kept back until it is known.
    """

    def __init__(self) -> None:
        self.calls = 0
        self._begun = 0  # calls that `CallStart` told of
        self._call: _Call | None = None  # the one under way
        self._closing = False  # a call's JSON is complete, its closing tag may follow
        self._after_call = False  # nothing but white space since a call
        self._held = ""

    def feed(self, text: str) -> list[Event]:
        """The events that this piece of text completes."""
        events: list[Event] = []
        while text:
            if self._call:
                text = self._read_call(self._call, text, events)
            elif self._closing:
                text = self._read_closing_tag(text)
            else:
                text = self._read_content(text, events)
        return events

    def finish(self) -> list[Event]:
        """What is left when the text has ended: an unfinished call is none."""
        events: list[Event] = []
        if self._call:
            self._give_back(self._call, events)
        if self._held.strip(_SPACE) or (self._held and not self._after_call):
            events.append(Content(self._held))
        self._held = ""
        return events

    def _read_content(self, text: str, events: list[Event]) -> str:
        """Content up to the next call; returns the text that is left."""
        text = self._held + text
        before, tag, rest = text.partition(OPEN)
        ready = before.rstrip(_SPACE) if tag else text[: len(text) - _length_to_hold(text)]
        if ready:
            events.append(Content(ready))
            self._after_call = False
        self._held = "" if tag else text[len(ready) :]
        if tag:
            self._call = _Call(self._begun, before[len(ready) :] + tag)
        return rest

    def _read_call(self, call: _Call, text: str, events: list[Event]) -> str:
        """The JSON of a call; returns the text behind it."""
        taken = call.scanner.feed(text)
        if call.scanner.done and not call.valid():
            call.scanner.broken = True
        events += call.new_events()
        if call.scanner.broken:
            self._give_back(call, events)
        elif call.scanner.done:
            self.calls += 1
            self._begun += 1
            self._call, self._closing, self._after_call = None, True, True
        return text[taken:]

    def _read_closing_tag(self, text: str) -> str:
        """Drops the closing tag; whatever else is there instead becomes content."""
        text = self._held + text
        stripped = text.lstrip(_SPACE)
        self._held = ""
        if stripped.startswith(CLOSE):
            self._closing = False
            return stripped[len(CLOSE) :]
        if CLOSE.startswith(stripped):
            self._held = text
            return ""
        self._closing = False
        return text

    def _give_back(self, call: _Call, events: list[Event]) -> None:
        raw = call.opening + call.scanner.text
        events.append(Broken(call.index, raw) if call.started else Content(raw))
        self._begun += call.started
        self._call, self._after_call = None, False


class _Call:
    """One call under way: its JSON, and how much of it events have told."""

    def __init__(self, index: int, opening: str) -> None:
        self.index = index
        self.opening = opening  # the tag and the white space before it
        self.scanner = ObjectScanner()
        self.started = False
        self._told = 0  # characters of the arguments

    def valid(self) -> bool:
        """Whether the complete object is a call."""
        return bool(self._name()) and self._whole_arguments() is not None

    def new_events(self) -> list[Event]:
        """What is new: the beginning, once the name is known, and arguments."""
        events: list[Event] = []
        scanner = self.scanner
        begin, end = scanner.values.get("arguments", (0, None))
        streams = scanner.text[begin : begin + 1] == "{" and "arguments" in scanner.values
        complete = scanner.done and not scanner.broken
        if not self.started and (name := self._name()) and (streams or complete):
            self.started = True
            events.append(CallStart(self.index, name))
            if not streams:
                events.append(Arguments(self.index, self._whole_arguments() or "{}"))
        if self.started and streams:
            new = scanner.text[begin + self._told : end]
            self._told += len(new)
            if new:
                events.append(Arguments(self.index, new))
        return events

    def _name(self) -> str | None:
        """The name, when all of it is there and it is one."""
        begin, end = self.scanner.values.get("name", (0, None))
        if end is None:
            return None
        name = json.loads(self.scanner.text[begin:end])
        return name if isinstance(name, str) and name else None

    def _whole_arguments(self) -> str | None:
        """JSON text of the complete arguments: an object, or a string that holds one, or none at
        all, as for a function without parameters; None for anything else."""
        begin, end = self.scanner.values.get("arguments", (0, 0))
        text = self.scanner.text[begin:end] or "{}"
        value = json.loads(text)
        if isinstance(value, str):
            text = value
            inner = ObjectScanner()
            taken = inner.feed(text)
            return text if inner.done and not text[taken:].strip(_SPACE) else None
        return "{}" if value is None else text if isinstance(value, dict) else None


def _length_to_hold(text: str) -> int:
    """Characters at the end of `text` that may belong to a call: white space, and what an opening
    tag begins with."""
    tag = next((n for n in range(len(OPEN) - 1, 0, -1) if text.endswith(OPEN[:n])), 0)
    before = text[: len(text) - tag]
    return tag + len(before) - len(before.rstrip(_SPACE))
