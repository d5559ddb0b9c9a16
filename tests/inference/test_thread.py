"""The engine on its own thread: many submit, cancel, drain; a full queue; a death that is told."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tiny_models import BYTES, build

from qwen2.common.errors import UserError
from qwen2.inference import (
    Engine,
    EngineConfig,
    EngineDead,
    EngineThread,
    Output,
    QueueFull,
    SamplingParams,
)

MODEL = build()
LONG = 60.0  # seconds that no test takes unless something hangs


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, "ignore_eos": True, **values})


@pytest.fixture
def thread() -> Iterator[EngineThread]:
    thread = EngineThread(Engine(MODEL, BYTES, EngineConfig(max_queue=50, max_running=4)))
    thread.start()
    yield thread
    thread.stop()
    assert thread.engine.stats.kv_used == 0


class Reader:
    """Waits for the outputs of one request."""

    def __init__(self) -> None:
        self.outputs: queue.Queue[Output] = queue.Queue()

    def rest(self) -> list[Output]:
        """All outputs up to the last."""
        outputs = [self.outputs.get(timeout=LONG)]
        while outputs[-1].finish_reason is None:
            outputs.append(self.outputs.get(timeout=LONG))
        return outputs


def test_requests_from_several_threads(thread: EngineThread) -> None:
    prompts = [[number] * (1 + number) for number in range(24)]
    expected = Engine(MODEL, BYTES).generate(prompts, params())
    answers: dict[int, list[int]] = {}

    def client(first: int) -> None:
        readers = []
        for number in range(first, 24, 3):
            reader = Reader()
            thread.submit(prompts[number], params(), on_output=reader.outputs.put)
            readers.append((number, reader))
        for number, reader in readers:
            answers[number] = [t for output in reader.rest() for t in output.token_ids]

    clients = [threading.Thread(target=client, args=(first,)) for first in range(3)]
    for each in clients:
        each.start()
    for each in clients:
        each.join(LONG)
    assert answers == {i: c.token_ids for i, c in enumerate(expected)}
    assert thread.drain(LONG)
    assert thread.engine.stats.running == thread.engine.stats.waiting == 0


def test_cancelling(thread: EngineThread) -> None:
    first, second = Reader(), Reader()
    request = thread.submit([1], params(max_tokens=120), on_output=first.outputs.put)
    thread.submit([2], params(), on_output=second.outputs.put)
    assert first.outputs.get(timeout=LONG).token_ids
    thread.cancel(request)
    assert first.rest()[-1].finish_reason == "cancelled"
    assert second.rest()[-1].finish_reason == "length"
    thread.cancel(request)
    reader = Reader()
    thread.submit([3], params(), on_output=reader.outputs.put)
    assert len(reader.rest()) == 20


def test_what_cannot_be_is_said_to_the_caller(thread: EngineThread) -> None:
    with pytest.raises(UserError, match="empty"):
        thread.submit([], params())
    assert thread.alive


def test_a_full_queue() -> None:
    engine = Engine(MODEL, BYTES, EngineConfig(max_queue=2))
    entered, go_on = threading.Event(), threading.Event()
    step = engine.step

    def slow() -> bool:
        entered.set()
        assert go_on.wait(LONG)
        return step()

    engine.step = slow  # type: ignore[method-assign]
    thread = EngineThread(engine)
    thread.start()
    readers = [Reader() for _ in range(3)]
    thread.submit([1], params(), on_output=readers[0].outputs.put)
    assert entered.wait(LONG)
    thread.submit([1], params(), on_output=readers[1].outputs.put)
    with pytest.raises(QueueFull):
        thread.submit([1], params(), on_output=readers[2].outputs.put)
    go_on.set()
    for reader in readers[:2]:
        assert reader.rest()[-1].finish_reason == "length"
    thread.submit([1], params(), on_output=readers[2].outputs.put)
    assert readers[2].rest()[-1].finish_reason == "length"
    thread.stop()


def test_draining(thread: EngineThread) -> None:
    reader = Reader()
    thread.submit([1], params(), on_output=reader.outputs.put)
    assert thread.drain(LONG)
    assert thread.alive
    assert reader.rest()[-1].finish_reason == "length"
    with pytest.raises(EngineDead, match="about to stop"):
        thread.submit([1], params())


def test_draining_has_an_end(thread: EngineThread) -> None:
    reader = Reader()
    thread.submit([1], params(max_tokens=120), on_output=reader.outputs.put)
    assert not thread.drain(0.0)
    thread.stop()
    assert reader.rest()[-1].finish_reason in ("cancelled", "length")
    assert not thread.alive


def test_the_death_of_the_engine_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(MODEL, BYTES, EngineConfig(max_running=1))
    thread = EngineThread(engine)
    thread.start()
    readers = [Reader(), Reader()]
    requests = [
        thread.submit([1], params(max_tokens=100), on_output=reader.outputs.put)
        for reader in readers
    ]
    readers[0].outputs.get(timeout=LONG)

    def fail(*_: object) -> None:
        raise ZeroDivisionError("on purpose")

    engine.runner.run = fail  # type: ignore[method-assign, assignment]
    for reader in readers:  # the one that runs and the one that waits
        last = reader.rest()[-1]
        assert (last.finish_reason, last.error) == ("error", "ZeroDivisionError: on purpose")
    assert [request.error for request in requests] == ["ZeroDivisionError: on purpose"] * 2
    assert not thread.alive
    assert thread.error == "ZeroDivisionError: on purpose"
    with pytest.raises(EngineDead, match="on purpose"):
        thread.submit([1], params())
    assert thread.drain(LONG)
    thread.stop()
    assert "Traceback" in capsys.readouterr().err
