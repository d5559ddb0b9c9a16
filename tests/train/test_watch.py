"""All that look on hear the same lines and the same end."""

from __future__ import annotations

from typing import Any

import pytest

from qwen2.common.errors import UserError
from qwen2.train.watch import Watchers


class Heard:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.end: list[tuple[str, str]] = []

    def write(self, line: dict[str, Any], /) -> None:
        self.lines.append(line)

    def close(self, state: str, reason: str, /) -> None:
        self.end.append((state, reason))


def test_they_hear_every_line_and_one_end() -> None:
    first, second = Heard(), Heard()
    with Watchers([first, second]) as watchers:
        watchers.write({"step": 1})
        watchers.write({"step": 2})
    assert first.lines == second.lines == [{"step": 1}, {"step": 2}]
    assert first.end == second.end == [("finished", "")]


def test_a_run_that_is_stopped() -> None:
    heard = Heard()
    with Watchers([heard]) as watchers:
        watchers.stop()
    assert heard.end == [("stopped", "")]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (UserError("data: not\nthere"), "data: not there"),
        (KeyError("x"), "KeyError: 'x'"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
    ],
)
def test_a_run_that_fails_says_why_in_one_line(error: BaseException, reason: str) -> None:
    heard = Heard()
    with pytest.raises(type(error)), Watchers([heard]):
        raise error
    assert heard.end == [("failed", reason)]


class Broken(Heard):
    """Cannot be closed."""

    def close(self, state: str, reason: str, /) -> None:
        raise OSError("no such folder")


def test_one_that_cannot_close_keeps_neither_the_others_nor_the_reason() -> None:
    heard = Heard()
    with pytest.raises(UserError, match="the first"), Watchers([Broken(), heard]):
        raise UserError("the first")
    assert heard.end == [("failed", "the first")]
    with pytest.raises(OSError, match="no such folder"), Watchers([Broken(), heard]):
        pass
    assert heard.end[1:] == [("finished", "")]
