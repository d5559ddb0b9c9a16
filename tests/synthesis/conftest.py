"""Documents to make something of, and a server that misbehaves as a test wants."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from qwen2.corpus.documents import Document, write_documents
from qwen2.synthesis import SynthesisRecipe

BRIDGE = (
    "The Firth of Forth bridge is a cantilever railway bridge in the east of Scotland. It was "
    "opened in March 1890 by the Prince of Wales and spans a total length of 2,467 metres.\n\n"
    "Construction of the bridge began in 1882. At its peak about 4,600 workers were employed, and "
    "more than 53,000 tonnes of steel and some 6.5 million rivets were used for the whole."
)
YEAST = (
    "Hefe ist ein einzelliger Pilz. Bäcker verwenden sie, weil sie den Zucker des Mehls in "
    "Kohlendioxid und Alkohol verwandelt. Das Gas wird im Kleber des Teigs festgehalten, der sich "
    "dehnt, und so geht das Brot auf. Im Ofen verdunstet der Alkohol, und die Hitze tötet die Hefe."
)


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Six documents of two languages, with licences; some have a group."""
    texts = [BRIDGE, YEAST, *(f"{BRIDGE}\n\nThis is copy {i} of it." for i in range(4))]
    path = tmp_path / "documents.parquet"
    write_documents(
        path,
        [
            Document(
                text, f"doc-{i}", f"texts/{i}.txt", "prose", "CC0-1.0",
                "de" if text == YEAST else "en", "bridges" if i >= 4 else None,
            )
            for i, text in enumerate(texts)
        ],
    )  # fmt: skip
    return path


@pytest.fixture
def recipe(documents: Path) -> SynthesisRecipe:
    """Questions and sections for every document."""
    tasks = {"qa": {"share": 1.0}, "textbook": {"share": 0.6}}
    return SynthesisRecipe.parse(
        {"sources": [{"path": str(documents)}], "model": "script", "tasks": tasks}
    )


Reply = tuple[int, dict[str, str], bytes]


@dataclass
class FakeServer:
    """An OpenAI server whose answers a test decides: `reply(body, times asked so)`."""

    url: str
    reply: Callable[[dict[str, Any], int], Reply | None]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    most_at_a_time: int = 0
    now: int = 0


def completion(text: str, **changes: Any) -> Reply:
    """A good answer."""
    body = {
        "model": "fake-1",
        "system_fingerprint": "fp",
        "choices": [{"message": {"content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2},
    }
    return 200, {}, json.dumps({**body, **changes}).encode()


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    """On the loopback interface; lists the model `fake`."""
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send((200, {}, json.dumps({"data": [{"id": "fake"}]}).encode()))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                times = sum(known["messages"] == body["messages"] for known in server.bodies)
                server.bodies.append(body)
                server.headers.append({k.lower(): v for k, v in self.headers.items()})
                server.times.append(time.monotonic())
                server.now += 1
                server.most_at_a_time = max(server.most_at_a_time, server.now)
            reply = server.reply(body, times)
            with lock:
                server.now -= 1
            if reply is None:  # hang up
                self.close_connection = True
                return
            self._send(reply)

        def _send(self, reply: Reply) -> None:
            status, headers, body = reply
            self.send_response(status)
            for name, value in {"content-length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: Any) -> None:  # clients that went away
            pass

    http = Quiet(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{http.server_address[1]}/v1"
    server = FakeServer(url, lambda body, times: completion("well"))
    thread = threading.Thread(target=http.serve_forever, daemon=True)
    thread.start()
    yield server
    http.shutdown()
    http.server_close()
