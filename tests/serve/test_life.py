"""Clients that leave, an engine that dies, a server that is told to end."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import raw
import tiny_models
import torch

from qwen2.model.hub import save

HELLO = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"
LONG = {"messages": HELLO, "max_tokens": 1900, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses"])
def test_who_leaves_cancels(
    served: Any, monkeypatch: pytest.MonkeyPatch, path: str, stream: bool
) -> None:
    body: dict[str, Any] = {
        CHAT: {**LONG, "n": 3},
        "/v1/completions": {"prompt": ["a", "b"], "max_tokens": 2000, "ignore_eos": True},
        "/v1/responses": {"input": "Hi"},
    }[path]
    served.wait_until_idle()
    before, cancelled = served.engine.stats.generated_tokens, threading.Event()
    cancel = served.thread.cancel

    def noted(request: Any) -> None:
        cancel(request)
        cancelled.set()

    monkeypatch.setattr(served.thread, "cancel", noted)
    with served.held(passes=2):
        with raw.connect(served.url) as connection:
            connection.sendall(raw.request(path, "POST", body={**body, "stream": stream}))
            served.wait_until(lambda: served.engine.stats.generated_tokens > before)
        assert cancelled.wait(30)
    served.wait_until_idle()
    assert served.engine.stats.generated_tokens - before < 100


def test_a_dead_engine_is_said(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as served:
        assert served.client.get("/health").status_code == 200

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory at 0xdeadbeef")

        monkeypatch.setattr(served.engine.runner, "run", fail)
        response = served.client.post(CHAT, json={"messages": HELLO})
        assert response.status_code == 500
        assert "deadbeef" not in response.text
        assert served.client.get("/health").status_code == 503
        response = served.client.post(CHAT, json={"messages": HELLO})
        assert response.status_code == 503
        assert 'qwen2:engine_alive{model_name="tiny"} 0.0' in served.client.get("/metrics").text


def test_an_engine_that_dies_in_a_stream_is_said_there(
    serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve() as served:
        run = served.engine.runner.run
        passes = iter(range(100))

        def fail_later(batch: Any) -> Any:
            if next(passes) == 5:
                raise RuntimeError
            return run(batch)

        monkeypatch.setattr(served.engine.runner, "run", fail_later)
        with served.client.stream("POST", CHAT, json={**LONG, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-1].startswith('data: {"error":{"message":"the engine failed')


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    save(tiny_models.build(max_position_embeddings=2048), tiny_models.BYTES, path)
    return path


def command(checkpoint: Path, *options: str) -> list[str]:
    own = ["serve", str(checkpoint), "--threads", "1", "--kv-tokens", "8192", *options]
    return [sys.executable, "-m", "qwen2.cli", *own]


@contextmanager
def started(checkpoint: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, when it says that it is ready, and the address it said."""
    process = subprocess.Popen(
        command(checkpoint, "--port", "0", *options),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("qwen2: tiny is served at http://127.0.0.1:"), process.communicate()
        yield process, line.split("served at ")[1].split(",")[0]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(checkpoint: Path, number: signal.Signals) -> None:
    with started(checkpoint) as (process, url):
        body = {"prompt": "a", "max_tokens": 400, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(number)
            until = time.monotonic() + 30
            with pytest.raises(httpx.ConnectError):  # noqa: PT012
                while time.monotonic() < until:
                    httpx.get(f"{url}/health", timeout=60)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def counted(url: str, name: str) -> float:
    """A figure of the engine."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return float(next(x for x in lines if x.startswith(f"qwen2:{name}{{")).split()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("rows", [(151_936, 152_064), (152_064, 151_936)])
def test_a_draft_model_changes_no_answer(tmp_path: Path, rows: tuple[int, int]) -> None:
    """With as many rows as the published models have, which are not of one number."""
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape["tie_word_embeddings"] = True
    models = [tiny_models.build(vocab_size=size, **shape) for size in rows]
    parameters = dict(models[0].named_parameters())
    with torch.no_grad():
        for name, own in models[1].named_parameters():  # nearly the same, so that guesses are right
            common = min(len(own), len(parameters[name]))
            own[:common] = parameters[name][:common]
            own[common:] *= 100  # its likeliest row is no token
    for name, model in zip(("tiny", "draft"), models, strict=True):
        save(model, tiny_models.BYTES, tmp_path / name)
    bodies: list[dict[str, Any]] = [
        {"prompt": "once upon a time", "max_tokens": 40, "ignore_eos": True, **more}
        for more in ({"temperature": 0}, {"temperature": 1, "seed": 7, "n": 2})
    ]
    answers = []
    for options in ((), ("--speculate", "4", "--draft", str(tmp_path / "draft"))):
        with started(tmp_path / "tiny", *options) as (_, url):
            made = [httpx.post(f"{url}/v1/completions", json=b, timeout=60).json() for b in bodies]
            answers.append([[choice["text"] for choice in each["choices"]] for each in made])
            guessed = counted(url, "spec_decode_num_draft_tokens_total")
            right = counted(url, "spec_decode_num_accepted_tokens_total")
            assert (guessed > 0, right > 0) == (bool(options), bool(options))
            assert right <= guessed
    assert answers[0] == answers[1]
    assert right > 20  # the greedy answer's at least


def test_what_does_not_finish_in_time_is_told(checkpoint: Path) -> None:
    body = {"prompt": ["a"] * 64, "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with started(checkpoint, "--drain-seconds", "0.5") as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.terminate()
            last = [line for line in lines if line][-1]
        assert '"code":"shutting_down"' in last
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


def test_what_cannot_be_served_is_one_line(checkpoint: Path, tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = {
            ("--port", port): f"127.0.0.1:{port}: Address already in use; choose another --port",
            ("--host", "0.0.0.0"): "--api-key-file",
            ("--host", "no.such.host.invalid"): "no.such.host.invalid:8000: ",
            ("--api-key-file", str(empty)): "it has no API key",
            ("--port", "0", "--kv-dtype", "int3"): "kv_dtype",
            ("--port", "99999"): "--port",
            ("--port", "0", "--draft", str(checkpoint)): "a draft model needs speculate",
        }
        for options, message in cases.items():
            done = subprocess.run(
                command(checkpoint, *options), capture_output=True, text=True, check=False
            )
            assert done.returncode == 2, done.stderr
            assert message in done.stderr
            assert done.stderr.count("\n") == 1


def test_what_is_not_installed_is_named(checkpoint: Path) -> None:
    program = "import sys; sys.modules['uvicorn'] = None; from qwen2.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, "serve", str(checkpoint)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "qwen2: serve needs uvicorn: pip install 'qwen2[serve]'\n"


def test_a_hostile_template_stops_nothing(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from qwen2.common import bounded_templates

    monkeypatch.setattr(bounded_templates.BoundedTemplate.__init__, "__defaults__", (1.0,))
    loop = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    tokenizer = replace(tiny_models.BYTES, chat_template="{{ messages[0].content }}" + loop)
    with serve(tokenizer=tokenizer) as served:
        response = served.client.post(CHAT, json={"messages": HELLO})
        assert response.status_code == 400
        assert "it was ended for taking more than" in response.json()["error"]["message"]
        assert served.client.get("/health").status_code == 200


@pytest.mark.slow
def test_two_hundred_vanish_and_ten_thousand_stay(serve: Any) -> None:
    """No block stays held, no request stuck, and memory is flat."""
    settings = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    with serve(engine={"max_queue": 1000, "max_running": 128}, **settings) as served:
        vanish(served, 200)
        served.wait_until_idle(60)
        raw.assert_memory_settles(lambda: soak(served, 2500), growth=2 * 2**20)
        soak(served, 2500)  # with the three rounds at least, ten thousand
        served.wait_until_idle(60)
        assert served.engine.scheduler.pool.held == 0
        text = served.client.get("/metrics").text
        assert 'qwen2:num_requests_waiting{model_name="tiny"} 0.0' in text


def vanish(served: Any, count: int) -> None:
    """Clients that leave in the middle of a stream, a few hundred tokens in or before any."""
    body = {"prompt": "a" * 40, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    data = raw.request("/v1/completions", "POST", body=body)

    def one(index: int) -> None:
        with raw.connect(served.url) as connection:
            connection.sendall(data)
            if index % 4:
                connection.recv(256 * (index % 8))

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def soak(served: Any, count: int, clients: int = 16) -> None:
    """Short requests, each of which must succeed."""
    body = raw.request(
        "/v1/completions", "POST", body={"prompt": "Hello", "max_tokens": 2, "ignore_eos": True}
    )
    failures: list[int] = []

    def client() -> None:
        with raw.connect(served.url) as connection:
            for _ in range(count // clients):
                connection.sendall(body)
                status, _ = raw.read(connection)
                if status != 200:
                    failures.append(status)
                    return

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert not failures
