"""JSON lines where there is no terminal: few, and always the last."""

from __future__ import annotations

import io
import json

from qwen2.common import progress
from qwen2.common.progress import Progress


def lines_of(stream: io.StringIO) -> list[dict[str, float]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_come_at_an_interval_and_at_the_end(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    clock = iter(range(100))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))
    stream = io.StringIO()
    with Progress("train", 10, stream, interval=3) as bar:
        for done in range(1, 11):
            bar.update(done, loss=done / 2)
    lines = lines_of(stream)
    assert [line["done"] for line in lines] == [1, 4, 7, 10]
    assert lines[-1] == {
        "stage": "train", "done": 10, "total": 10, "elapsed_s": 10.0, "eta_s": 0.0, "loss": 5.0,
    }  # fmt: skip
    assert lines[1]["eta_s"] == 6.0  # 4 of 10 in 4 s


def test_what_was_held_back_comes_even_when_the_work_fails() -> None:
    stream = io.StringIO()
    try:
        with Progress("x", 4, stream, interval=1000) as bar:
            bar.update(1)
            bar.update(2)
            raise RuntimeError
    except RuntimeError:
        pass
    assert [line["done"] for line in lines_of(stream)] == [1, 2]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress("train", 2, stream) as bar:
        bar.update(2, loss=1.25)
    assert "train" in stream.getvalue()
    assert "100%" in stream.getvalue()


def test_what_is_told_comes_at_once_and_holds_nothing_up() -> None:
    stream = io.StringIO()
    with Progress("train", 4, stream, interval=1000) as bar:
        bar.update(1, loss=3.0)
        bar.update(2, loss=2.0)
        bar.tell(2, evaluation={"code": 1.5})
    first, told, last = lines_of(stream)
    assert (first["done"], told["done"], last["done"]) == (1, 2, 2)
    assert told["evaluation"] == {"code": 1.5}
    assert "loss" not in told
    assert last["loss"] == 2.0


def test_a_terminal_shows_what_is_told_and_the_figures_beside_the_bar() -> None:
    stream = Terminal()
    with Progress("train", 2, stream) as bar:
        bar.tell(1200, evaluation={"code [x]": 1.23456, "prose": 2})
        bar.update(2, loss=1.25, tokens_per_s=640.0)
    assert "1,200  evaluation code [x] 1.235, prose 2" in stream.getvalue()
    assert "tokens_per_s 640" in stream.getvalue()
