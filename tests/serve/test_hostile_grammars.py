"""Schemas that are made to break whoever compiles them: no 5xx, the next request succeeds, memory
is flat once what is kept of a grammar is kept; and who waits for others' schemas is told to come
again, not that his own is bad."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import raw

from qwen2.inference import grammar, grammar_check
from qwen2.serve import service

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


EXPLODING = {"type": "integer", "multipleOf": 99999999}  # minutes of llguidance's time


def asking(served: Any, schema: Any) -> Any:
    """The answer to a question with a schema."""
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    body = {"messages": HELLO, "max_tokens": 5, "response_format": wanted}
    return served.client.post(CHAT, json=body)


def test_a_schema_that_waits_too_long_may_come_again(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as served:
        assert asking(served, {"type": "boolean"}).status_code == 200
        with served.engine._grammars._checker._lock, monkeypatch.context() as patched:
            patched.setattr(grammar_check, "WAIT", 0.01)
            response = asking(served, {"type": "null"})
            assert asking(served, {"type": "boolean"}).status_code == 200  # it is known
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert asking(served, {"type": "null"}).status_code == 200
        served.wait_until_idle()


def test_only_the_schema_that_takes_too_long_is_bad(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_check, "PATIENCE", 2.0)
    monkeypatch.setattr(grammar_check, "WAIT", 60.0)
    another = {**EXPLODING, "multipleOf": 99999989}
    schemas = [EXPLODING, {"type": "boolean"}, another, {"type": "null"}]
    with serve() as served, ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda schema: asking(served, schema), schemas))
        assert [answer.status_code for answer in answers] == [400, 200, 400, 200]
        for bad in (answers[0], answers[2]):
            assert "takes too much time" in bad.json()["error"]["message"]
        served.wait_until_idle()


def test_nobody_else_waits_for_new_schemas(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than there are threads; and more than may wait are told to come again."""
    monkeypatch.setattr(grammar_check, "WAIT", 60.0)
    monkeypatch.setattr(service, "MOST_COMPILING", 6)
    with serve() as served, ThreadPoolExecutor(8) as clients:
        assert asking(served, {"type": "boolean"}).status_code == 200
        refused, answers = threading.Semaphore(0), list[Future[Any]]()

        def ask(number: int) -> Any:
            answer = asking(served, {"const": number})
            if answer.status_code == 429:
                refused.release()
            return answer

        with served.engine._grammars._checker._lock:
            answers = [clients.submit(ask, number) for number in range(8)]
            for _ in range(2):
                assert refused.acquire(timeout=30)
            for _ in range(6):
                served.post(CHAT, messages=HELLO, max_tokens=1)
                assert asking(served, {"type": "boolean"}).status_code == 200
        codes = sorted(answer.result().status_code for answer in answers)
        assert codes == [200] * 6 + [429] * 2
        served.wait_until_idle()


def test_nothing_is_compiled_for_who_has_left(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar_check, "WAIT", 60.0)
    monkeypatch.setattr(service, "COMPILING", 1)
    handed_over = threading.Semaphore(0)

    class Pool(ThreadPoolExecutor):
        """Tells when a request waits for the one thread that compiles, which takes them in turn."""

        def __init__(self, threads: int, name: str) -> None:
            super().__init__(threads, name)
            self.compiles = name == "compile"

        def submit(self, *args: Any) -> Future[Any]:  # type: ignore[override]
            future = super().submit(*args)
            if self.compiles:
                handed_over.release()
            return future

    monkeypatch.setattr(service, "ThreadPoolExecutor", Pool)
    compiled: list[str] = []
    compile_ = grammar.compile_grammar
    monkeypatch.setattr(
        grammar, "compile_grammar", lambda *args: compiled.append(args[1]) or compile_(*args)
    )
    wanted = {"type": "json_schema", "json_schema": {"schema": {"const": "gone"}}}
    body = {"messages": HELLO, "response_format": wanted}
    with serve() as served, ThreadPoolExecutor(1) as clients:
        with served.engine._grammars._checker._lock:
            first = clients.submit(asking, served, {"const": "first"})
            assert handed_over.acquire(timeout=30)
            with raw.connect(served.url) as connection:
                connection.sendall(raw.request(CHAT, "POST", body=body))
                assert handed_over.acquire(timeout=30)
            served.wait_until(lambda: 'status="499"' in served.client.get("/metrics").text)
        assert first.result().status_code == 200
        assert asking(served, {"const": "last"}).status_code == 200
        assert compiled == ['{"const": "first"}', '{"const": "last"}']
