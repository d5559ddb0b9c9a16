"""Follows one JSON object (RFC 8259) as its characters come, to say where it ends or breaks.

A tool call must end where its JSON ends, not at the first `</tool_call>`, which may stand inside a
string; and its arguments are passed on before they are complete. So this reads character by
character, keeps the containers that are open, and notes where the outermost object's values lie.
"""

from __future__ import annotations

import json
import re

MAX_DEPTH = 64  # containers inside each other; json.loads would go on to Python's own limit

_SPACE = " \t\n\r"
# Numbers are bounded, for Python refuses to read integers of thousands of digits.
_SCALAR = re.compile(r"-?(0|[1-9]\d{0,999})(\.\d{1,999})?([eE][+-]?\d{1,9})?|true|false|null")
_SCALAR_CHARS = frozenset("+-.0123456789eEtrufalsn")


class _MalformedError(Exception):
    pass


class ObjectScanner:
    """Feed it text until it is `done` or `broken`; `text` holds what it has taken.

    `values` maps each key of the outermost object to where its value lies in `text`: (start, end),
    end being None while the value goes on. A key that comes twice breaks the object.
    """

    def __init__(self) -> None:
        self.text = ""
        self.done = self.broken = False
        self.values: dict[str, tuple[int, int | None]] = {}
        self._open: list[str] = []  # "{" or "[" of each container that is open
        self._expect = "object"
        self._start = 0  # of the string or scalar under way
        self._escaped = False
        self._key = ""

    def feed(self, text: str) -> int:
        """Take characters up to the object's end, or up to the first that no object could have
        here; returns how many."""
        before = len(self.text)
        self.text += text
        for at in range(before, len(self.text)):
            try:
                self._take(self.text[at], at)
            except _MalformedError:
                self.broken = True
                self.text = self.text[:at]
                return at - before
            if self.done:
                self.text = self.text[: at + 1]
                return at + 1 - before
        return len(text)

    def _take(self, char: str, at: int) -> None:
        if self._expect in ("string", "key string"):
            self._inside_string(char, at)
            return
        if self._expect == "scalar":
            if char in _SCALAR_CHARS:
                return
            if not _SCALAR.fullmatch(self.text, self._start, at):
                raise _MalformedError
            self._end_value(at)
        if char not in _SPACE:
            self._outside_string(char, at)

    def _inside_string(self, char: str, at: int) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char < " ":
            raise _MalformedError
        elif char == '"':
            try:
                string = json.loads(self.text[self._start : at + 1])
            except ValueError:  # an escape that there is not
                raise _MalformedError from None
            if self._expect == "string":
                self._end_value(at + 1)
                return
            if len(self._open) == 1 and string in self.values:
                raise _MalformedError
            if len(self._open) == 1:
                self._key = string
            self._expect = "colon"

    def _outside_string(self, char: str, at: int) -> None:
        expect = self._expect
        if char == '"' and expect.startswith("key"):
            self._start, self._expect = at, "key string"
        elif char == '"' and expect.startswith("value"):
            self._begin_value(at, "string")
        elif char in "{[" and (expect.startswith("value") or (expect, char) == ("object", "{")):
            if len(self._open) == MAX_DEPTH:
                raise _MalformedError
            self._begin_value(at, "key or end" if char == "{" else "value or end")
            self._open.append(char)
        elif char in "}]" and expect.endswith("or end") and self._open[-1] + char in ("{}", "[]"):
            self._open.pop()
            self._end_value(at + 1)
        elif (char, expect) == (":", "colon"):
            self._expect = "value"
        elif (char, expect) == (",", "comma or end"):
            self._expect = "key" if self._open[-1] == "{" else "value"
        elif char in _SCALAR_CHARS and expect.startswith("value"):
            self._begin_value(at, "scalar")
        else:
            raise _MalformedError

    def _begin_value(self, at: int, expect: str) -> None:
        self._start, self._expect = at, expect
        if len(self._open) == 1:
            self.values[self._key] = (at, None)

    def _end_value(self, end: int) -> None:
        self.done = not self._open
        self._expect = "comma or end"
        if len(self._open) == 1:
            self.values[self._key] = (self.values[self._key][0], end)
