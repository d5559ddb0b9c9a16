"""`qwen2 bench`: its keys and errors, the arithmetic of its figures, and when its load comes."""

from __future__ import annotations

import asyncio
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.common.spread import percentile, percentiles, spread
from qwen2.inference import Engine
from qwen2.inference.bench import bytes_per_token, decode, random_prompt, weight_bytes
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hub import save
from qwen2.serve.bench import (
    Clock,
    Load,
    Sample,
    ServerError,
    arrivals,
    decode_rate,
    drive,
    measure,
    run_load,
    summarise,
)
from qwen2.tokenizer import Tokenizer

BYTES = Tokenizer.from_ranks(
    {bytes([value]): value for value in range(256)},
    {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
)


def tiny(tied: bool = True) -> Qwen2:
    config = ModelConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen2(config)
    init_weights(model, torch.Generator().manual_seed(0))
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of bytes, in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("model") / "random"
    save(tiny(), BYTES, folder)
    return folder


def qwen2(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen2.cli", "bench", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_percentiles_by_hand() -> None:
    values = [4.0, 1.0, 3.0, 2.0]
    assert percentile(values, 0) == 1
    assert percentile(values, 50) == 2.5
    assert percentile(values, 99) == pytest.approx(3.97)
    assert percentile(values, 100) == 4
    assert percentile([7.0], 99) == 7
    assert percentiles(values) == {"mean": 2.5, "p50": 2.5, "p99": 3.97}
    assert percentiles([]) == {}
    assert spread(values) == {"median": 2.5, "min": 1.0, "max": 4.0}


def test_decode_counts_the_tokens_after_the_first() -> None:
    engine = Engine(tiny(), BYTES)
    run = engine.runner.run
    done = decode(engine, random_prompt(20, 1), 6)
    assert done.tokens == 6
    assert 0 < done.in_model < done.seconds
    assert done.overhead == pytest.approx(1 - done.in_model / done.seconds)
    assert engine.runner.run == run
    assert not engine.has_work


def test_bytes_of_weights_count_once_what_is_tied() -> None:
    for tied in (True, False):
        model = tiny(tied)
        model.fuse_projections()
        assert weight_bytes(model) == 4 * model.config.num_parameters()
        embedding = 0 if tied else 4 * 264 * 32
        assert bytes_per_token(model) == weight_bytes(model) - embedding


def test_prompts_follow_the_seed() -> None:
    assert random_prompt(9, 1, 2) == random_prompt(9, 1, 2)
    assert random_prompt(9, 1, 2) != random_prompt(9, 1, 3)
    assert all(0 <= token < 94 for token in random_prompt(500, 0))


def test_the_command_prints_its_keys(folder: Path) -> None:
    for what, length in (("decode", 8), ("prefill", 16)):
        done = qwen2(what, folder, "--prompt-tokens", length, "--runs", 2, "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert set(result["tokens_per_second"]) == {"median", "min", "max"}
        assert result["runs"] == 2
        assert "cores" in result["hardware"]
        assert result["weights"] == "float32"
        assert json.loads(done.stderr.splitlines()[-1])["done"] == 3  # with one to warm up
    text = qwen2("decode", folder, "--prompt-tokens", 8, "--runs", 1, "-n", 4).stdout
    assert "tokens per second" in text
    assert "decode, 4 tokens after 8" in text


def test_errors_are_one_line(folder: Path) -> None:
    for arguments, words in (
        (("decode", folder, "--prompt-tokens", 2000), "beyond the context of 1024"),
        (("decode", folder.parent / "none"), "no such folder or file"),
        (("serve",), "one of the two"),
        (("serve", folder, "--url", "http://127.0.0.1:1"), "one of the two"),
        (("serve", "--url", "http://127.0.0.1:1"), "no server there"),
        (("serve", "--url", "nonsense"), "no server there"),
        (("serve", folder, "--rate", 0), "rate"),
        (("serve", folder, "--rate", 1, "--concurrency", 1), "one of the two"),
    ):
        done = qwen2(*arguments)
        assert done.returncode == 2, arguments
        assert words in done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


class FakeTime:
    """A clock that is moved by whoever sleeps longest; requests take `service` seconds."""

    def __init__(self, service: float = 0.0) -> None:
        self.time, self.service, self.sent = 100.0, service, []  # type: ignore[var-annotated]
        self._sleepers: list[tuple[float, asyncio.Event]] = []

    @property
    def clock(self) -> Clock:
        return Clock(lambda: self.time, self.sleep)

    async def sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        self._sleepers.append((self.time + seconds, event))
        if len(self._sleepers) == 1:
            self._task = asyncio.create_task(self._turn())
        await event.wait()

    async def _turn(self) -> None:
        while self._sleepers:
            for _ in range(20):  # until everyone else waits
                await asyncio.sleep(0)
            until, event = min(self._sleepers, key=lambda sleeper: sleeper[0])
            self._sleepers.remove((until, event))
            self.time = max(self.time, until)
            event.set()

    async def send(self, number: int, sample: Sample) -> None:
        self.sent.append((number, self.time))
        await self.sleep(self.service)
        sample.stamps = [self.time]


def test_the_open_loop_follows_the_seed() -> None:
    due = arrivals(2000, 5.0, 3)
    assert due == arrivals(2000, 5.0, 3) != arrivals(2000, 5.0, 4)
    assert due == sorted(due)
    assert due[-1] == pytest.approx(400, rel=0.1)

    # A server that takes far longer than requests are apart does not hold them up.
    fake = FakeTime(service=30.0)
    load = Load(requests=10, rate=5.0, seed=3)
    samples = asyncio.run(drive(load, fake.send, clock=fake.clock))
    assert [number for number, _ in fake.sent] == list(range(10))
    assert [time - 100 for _, time in fake.sent] == pytest.approx(due[:10])
    assert [sample.due - 100 for sample in samples] == pytest.approx(due[:10])
    assert [sample.ended - sample.due for sample in samples] == pytest.approx([30.0] * 10)


def test_the_closed_loop_keeps_so_many_busy() -> None:
    fake, told = FakeTime(service=2.0), []  # type: ignore[var-annotated]
    load = Load(requests=7, concurrency=3)
    samples = asyncio.run(drive(load, fake.send, clock=fake.clock, tell=told.append))
    assert [time - 100 for _, time in fake.sent] == [0, 0, 0, 2, 2, 2, 4]
    assert [number for number, _ in fake.sent] == list(range(7))
    assert len(samples) == 7
    assert told == list(range(1, 8))


def test_a_failed_request_is_counted_and_the_others_go_on() -> None:
    async def send(number: int, sample: Sample) -> None:
        if number % 2:
            raise ServerError("status 429: too many")
        sample.stamps, sample.tokens = [sample.due + 1, sample.due + 2], 2

    samples = asyncio.run(drive(Load(requests=5, concurrency=1), send))
    figures = summarise([samples])
    assert figures["errors"] == 2
    assert figures["error_messages"] == {"status 429: too many": 2}
    assert figures["generated_tokens"] == 6
    with pytest.raises(UserError, match="every request failed: status 429"):
        summarise([[sample for sample in samples if sample.error]])


def test_summary_by_hand() -> None:
    one = [
        Sample(due=0.0, stamps=[1.0, 1.5, 2.5], ended=2.5, prompt_tokens=4, tokens=3),
        Sample(due=0.0, stamps=[2.0, 3.0, 4.0], ended=4.0, prompt_tokens=4, tokens=3),
    ]
    two = [Sample(due=10.0, stamps=[10.5], ended=11.0, prompt_tokens=4, tokens=1)]
    figures = summarise([one, two])
    assert figures["tokens_per_second"] == {"median": 1.25, "min": 1.0, "max": 1.5}
    assert figures["requests_per_second"]["max"] == 1.0
    assert figures["time_to_first_token"] == percentiles([1.0, 2.0, 0.5])
    assert figures["inter_token_latency"] == percentiles([0.5, 1.0, 1.0, 1.0])
    assert figures["request_latency"]["p50"] == 2.5
    assert (figures["prompt_tokens"], figures["generated_tokens"]) == (12, 7)
    # After 2.0, when all have begun: one token of the first and two of the second, until 4.0.
    assert decode_rate(one) == pytest.approx(1.5)


class Handler(http.server.BaseHTTPRequestHandler):
    """The least that speaks OpenAI's API: streams as many letters as asked for."""

    asked: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._begin("application/json")
        self.wfile.write(b'{"data": [{"id": "letters"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        if body["max_tokens"] == 13:
            self.send_error(429, "too many")
            return
        self._begin("text/event-stream")
        for _ in range(body["max_tokens"]):
            self._event({"choices": [{"text": "a"}]})
        if body["max_tokens"] == 14:  # breaks off
            return
        usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
        self._event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def _event(self, value: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    Handler.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_load_of_a_server(server: str) -> None:
    load = Load(requests=6, prompt_tokens=5, max_tokens=7, concurrency=2, seed=1)
    figures = measure(server, load, runs=2)
    assert (figures["requests"], figures["errors"], figures["runs"]) == (12, 0, 2)
    assert (figures["prompt_tokens"], figures["generated_tokens"]) == (60, 84)
    prompts = [tuple(body["prompt"]) for body in Handler.asked]
    assert len(set(prompts)) == 13  # no prompt comes twice; one was to warm up
    assert all(body["model"] == "letters" and body["ignore_eos"] for body in Handler.asked)


def test_refusals_and_broken_streams_are_errors(server: str) -> None:
    for tokens, words in ((13, "status 429"), (14, "broke off")):
        load = Load(requests=3, max_tokens=tokens, rate=1000.0)
        samples = asyncio.run(run_load(server, load))
        assert all(words in (sample.error or "") for sample in samples)


def test_the_command_loads_a_server(server: str) -> None:
    done = qwen2("serve", "--url", server, "--requests", 4, "--rate", 100, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["generated_tokens"] == 4 * 64
    assert result["load"]["rate"] == 100
    assert set(result["tokens_per_second"]) == {"median", "min", "max"}
    assert {"p50", "p99"} <= set(result["time_to_first_token"])
    assert "4 requests, 0 failed" in qwen2("serve", "--url", server, "--requests", 4).stdout
