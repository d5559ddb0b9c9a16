"""A server of a tiny model, in this process, asked over a real socket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import tiny_models
import torch
import uvicorn

from qwen2.inference import Engine, EngineConfig, EngineThread
from qwen2.serve.app import create_app
from qwen2.serve.run import uvicorn_config
from qwen2.serve.settings import Keys, Limits, Settings
from qwen2.tokenizer import Tokenizer


@dataclass
class Served:
    """A running server: where, of what, and how much it has to do."""

    url: str
    engine: Engine
    thread: EngineThread
    client: httpx.Client

    def post(self, path: str, **body: Any) -> Any:
        """The JSON of an answer, which must be a success."""
        response = self.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def idle(self) -> bool:
        """Whether nothing runs, waits or holds a block."""
        stats = self.engine.stats
        return (stats.running, stats.waiting, stats.kv_used) == (0, 0, 0)

    def wait_until(self, true: Callable[[], object], seconds: float = 30.0) -> None:
        """It must become true, and soon."""
        until = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < until, self.engine.stats
            time.sleep(0.02)

    def wait_until_idle(self, seconds: float = 30.0) -> None:
        """All requests must end, and soon."""
        self.wait_until(self.idle, seconds)

    @contextmanager
    def held(self, passes: int = 0) -> Iterator[None]:
        """The engine makes so many passes, then none until this is left: no request can end
        before a test has looked at it, however long that takes."""
        step, go_on = self.engine.step, threading.Event()

        def held_step() -> bool:
            nonlocal passes
            passes -= 1
            assert passes >= 0 or go_on.wait(120)
            return step()

        self.engine.step = held_step  # type: ignore[method-assign]
        try:
            yield
        finally:
            self.engine.step = step  # type: ignore[method-assign]
            go_on.set()


Serve = Callable[..., AbstractContextManager[Served]]


@contextmanager
def serving(
    *,
    keys: tuple[str, ...] = (),
    limits: Limits | None = None,
    names: tuple[str, ...] = ("tiny",),
    hosts: tuple[str, ...] | None = ("127.0.0.1", "localhost"),
    tokenizer: Tokenizer = tiny_models.BYTES,
    engine: dict[str, Any] | None = None,
    **shape: Any,
) -> Iterator[Served]:
    """A server of a random model with these settings."""
    torch.set_num_threads(1)
    model = tiny_models.build(**{"max_position_embeddings": 2048, **shape})
    made = Engine(model, tokenizer, EngineConfig(**{"kv_tokens": 16384, **(engine or {})}))
    thread = EngineThread(made)
    thread.start()
    settings = Settings(names, Keys(keys), hosts, limits)
    server = uvicorn.Server(uvicorn_config(create_app(thread, settings), settings.limits, 5.0))
    running = threading.Thread(target=server.run, daemon=True)
    running.start()
    until = time.monotonic() + 60
    while not server.started:
        assert running.is_alive()
        assert time.monotonic() < until
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            yield Served(url, made, thread, client)
    finally:
        server.should_exit = True
        running.join(30)
        thread.stop()
    assert not running.is_alive()


@pytest.fixture(scope="session")
def serve() -> Serve:
    """Makes further servers: `with serve(keys=(...)) as served:`."""
    return serving


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """The server that most tests share."""
    with serving() as running:
        yield running
