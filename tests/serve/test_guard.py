"""What every request passes first: keys, names, sizes, times."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import raw

from qwen2.common.errors import UserError
from qwen2.serve.guard import nesting
from qwen2.serve.settings import Keys, Limits

KEY = "key-of-alice"
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def locked(serve: Any) -> Iterator[Any]:
    """A server with two keys and tight limits."""
    limits = Limits(
        header_bytes=8192,
        headers=50,
        body_bytes=100_000,
        bodies_bytes=150_000,
        depth=20,
        connections=8,
        header_seconds=1,
        body_seconds=1,
        keep_alive_seconds=1,
        stalled_seconds=1,
    )
    with serve(keys=(KEY, "key-of-bob"), limits=limits) as served:
        yield served


ROUTES = [
    ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"), ("POST", "/v1/embeddings"), ("POST", "/v1/responses"),
    ("POST", "/v1/responses/input_tokens"), ("POST", "/tokenize"), ("POST", "/detokenize"),
    ("GET", "/metrics"), ("GET", "/openapi.json"), ("GET", "/no/such/path"),
    ("OPTIONS", "/v1/models"), ("TRACE", "/health/"), ("HEAD", "/v1/models"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "headers",
    [
        (),
        ("Authorization: Bearer wrong-key",),
        ("Authorization: Bearer",),
        ("Authorization: Bearer ",),
        (f"Authorization: Basic {KEY}",),
        (f"Authorization: {KEY}",),
        (f"Authorization: Bearer {KEY}x",),
        (f"Authorization: Bearer {KEY[:-1]}",),
        ("Authorization: Bearer \xff\xfe",),
        (f"Authorization: Bearer {KEY}", f"Authorization: Bearer {KEY}"),
        (f"X-Api-Key: {KEY}",),
    ],
)
def test_every_route_wants_a_key(
    locked: Any, method: str, path: str, headers: tuple[str, ...]
) -> None:
    status, _ = raw.exchange(
        locked.url, raw.request(path, method, headers=(*headers, "Connection: close"))
    )
    assert status == 401


@pytest.mark.parametrize(
    "path",
    [
        "//v1/models", "/./v1/models", "/health/../v1/models", "/health/%2e%2e/v1/models",
        "/%2e%2e/v1/models", "/v1/models?x=/health", "/v1/models#/health", "/v1/models;/health",
        "/%76%31/models", "/v1%2fmodels", "/health%00/v1/models", "/health//", "/HEALTH",
        "/chat.js/../v1/models", "/\\v1/models", "/v1/models/",
    ],
)  # fmt: skip
def test_no_spelling_of_a_path_avoids_the_key(locked: Any, path: str) -> None:
    status, body = raw.exchange(locked.url, raw.request(path, headers=("Connection: close",)))
    assert status in (400, 401)
    assert b"tiny" not in body


@pytest.mark.parametrize(
    "target", ["http://127.0.0.1/v1/models", "http://evil.example/health", "*", "evil.example:80"]
)
def test_absolute_forms_are_no_paths(locked: Any, target: str) -> None:
    status, body = raw.exchange(locked.url, raw.request(target, headers=("Connection: close",)))
    assert 400 <= status < 500
    assert b"tiny" not in body


def test_head_is_get_without_the_body(locked: Any) -> None:
    """Watchers of health ask so."""
    for path in ("/health", "/", "/v1/models"):
        whole, head = locked.client.get(path), locked.client.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == whole.headers["content-length"]
    assert locked.client.head("/v1/none").status_code == 404
    assert locked.client.head("/v1/chat/completions").status_code == 405
    assert locked.client.get("/v1/models").status_code == 200


def test_what_is_open(locked: Any) -> None:
    for path in ("/health", "/", "/style.css"):
        assert raw.exchange(locked.url, raw.request(path))[0] == 200
    assert locked.client.get("/v1/models").status_code == 200
    for key in (KEY, "key-of-bob"):
        header = (f"authorization: bearer {key}",)
        assert raw.exchange(locked.url, raw.request(headers=header))[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "", "10.0.0.1"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/"])
def test_other_host_names_are_refused(locked: Any, host: str, path: str) -> None:
    """A web page may give its own name the address 127.0.0.1."""
    data = raw.request(path, host=host, headers=(f"Authorization: Bearer {KEY}",))
    assert raw.exchange(locked.url, data)[0] in (400, 403)


def test_host_headers_that_are_doubled_or_missing(locked: Any) -> None:
    for lines in ("", "Host: 127.0.0.1\r\nHost: evil.example\r\n"):
        data = f"GET /health HTTP/1.1\r\n{lines}\r\n".encode()
        assert raw.exchange(locked.url, data)[0] == 400
    assert raw.exchange(locked.url, b"GET /health HTTP/1.0\r\n\r\n")[0] == 400


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1"])
def test_pages_of_other_origins_are_refused(locked: Any, origin: str) -> None:
    for method in ("GET", "OPTIONS"):
        data = raw.request(
            "/v1/models", method, headers=(f"Authorization: Bearer {KEY}", f"Origin: {origin}")
        )
        status, _ = raw.exchange(locked.url, data)
        assert status == 403
    response = locked.client.get("/v1/models")
    assert not [name for name in response.headers if name.startswith("access-control")]


def test_only_json_is_a_body(locked: Any) -> None:
    """A page may send text/plain to any server without asking it first."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        response = locked.client.post(
            "/v1/completions", content=b'{"prompt": "a"}', headers={"content-type": kind}
        )
        assert response.status_code == 415
    good = {"content-type": "application/json; charset=utf-8"}
    body = b'{"prompt": "a", "max_tokens": 1}'
    assert locked.client.post("/v1/completions", content=body, headers=good).status_code == 200


def test_errors_have_openais_form(locked: Any) -> None:
    response = locked.client.get("/v1/models", headers={"authorization": ""})
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"].startswith("req_")
    assert response.headers["x-content-type-options"] == "nosniff"


def test_large_bodies(locked: Any) -> None:
    headers = (f"Authorization: Bearer {KEY}", "Content-Length: 99999999", "Expect: 100-continue")
    with raw.connect(locked.url) as connection:  # the length alone is enough
        connection.sendall(raw.request("/tokenize", "POST", headers=headers))
        assert raw.read(connection)[0] == 413
    chunk = b"%x\r\n%s\r\n" % (50_000, b"x" * 50_000)
    head = raw.request(
        "/tokenize", "POST", headers=(f"Authorization: Bearer {KEY}", "Transfer-Encoding: chunked")
    )
    assert raw.exchange(locked.url, head + chunk * 5)[0] == 413
    assert locked.client.post("/tokenize", json={"prompt": "x" * 99_000}).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        tuple(f"X-{i}: y" for i in range(60)),
        ("X: " + "y" * 9000,),
        tuple(f"X-{i}: {'y' * 500}" for i in range(20)),
        ("X" * 9000 + ": y",),
    ],
)
def test_large_headers(locked: Any, headers: tuple[str, ...]) -> None:
    status, _ = raw.exchange(locked.url, raw.request("/health", headers=headers))
    assert status in (400, 431)
    assert raw.exchange(locked.url, raw.request("/" + "x" * 9000))[0] in (400, 431)


@pytest.mark.parametrize("begin", [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: 12"])
def test_slow_headers_end(locked: Any, begin: bytes) -> None:
    began = time.monotonic()
    with raw.connect(locked.url) as connection:
        connection.sendall(begin)
        assert raw.read(connection)[0] == 408
        assert 0.5 < time.monotonic() - began < 10


def test_headers_that_drip_end(locked: Any) -> None:
    """Even on a connection that has had an answer before."""
    with raw.connect(locked.url) as connection:
        connection.sendall(raw.request("/health"))
        assert raw.read(connection)[0] == 200
        began, answer = time.monotonic(), None
        connection.settimeout(0.05)
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /health HTTP/1.1\r\nX: ")
            while answer is None and time.monotonic() - began < 20:
                connection.sendall(b"y")
                with contextlib.suppress(TimeoutError):
                    answer = connection.recv(100)
        assert not answer or answer.startswith(b"HTTP/1.1 408 ")
        assert 0.5 < time.monotonic() - began < 20


def test_slow_bodies_end(locked: Any) -> None:
    with raw.connect(locked.url) as connection:
        data = raw.request(
            "/tokenize", "POST", headers=(f"Authorization: Bearer {KEY}",), body=CHAT
        )
        connection.sendall(data[:-5])
        began = time.monotonic()
        assert raw.read(connection)[0] == 408
        assert time.monotonic() - began < 10


def test_idle_connections_end(locked: Any) -> None:
    with raw.connect(locked.url) as connection:
        began = time.monotonic()
        connection.sendall(raw.request("/health"))
        raw.read(connection)
        assert connection.recv(1) == b""
        assert 0.5 < time.monotonic() - began < 10


def test_whoever_reads_nothing_is_left(locked: Any) -> None:
    """Its answer does not stay in memory, nor its request in the engine."""
    locked.wait_until_idle()
    before = locked.engine.stats.generated_tokens
    body = {"prompt": ["x"] * 64, "max_tokens": 1500, "logprobs": 20, "stream": True}
    with raw.connect(locked.url) as connection:
        header = (f"Authorization: Bearer {KEY}",)
        connection.sendall(raw.request("/v1/completions", "POST", headers=header, body=body))
        locked.wait_until(lambda: locked.engine.stats.generated_tokens > before)
        locked.wait_until_idle(60)


def test_connections_have_a_number(serve: Any) -> None:
    with serve(limits=Limits(connections=3)) as served, contextlib.ExitStack() as stack:
        connections = [stack.enter_context(raw.connect(served.url)) for _ in range(5)]
        assert [raw.read(connection)[0] for connection in connections[3:]] == [503, 503]
        for connection in connections[:3]:
            connection.sendall(raw.request("/health"))
            assert raw.read(connection)[0] == 200
        stack.close()
        served.wait_until(lambda: served.client.get("/health").status_code == 200)


def test_garbage_is_a_400(locked: Any) -> None:
    for data in (b"\x16\x03\x01\x00\xa5\x01\x00", b"GARBAGE\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"):
        status, body = raw.exchange(locked.url, data + b"\r\n\r\n")
        assert status == 400
        assert b'{"error"' in body


def test_bodies_together_have_a_bound(serve: Any) -> None:
    with serve(limits=Limits(bodies_bytes=1000), engine={"max_running": 1}) as served:
        body = {"prompt": "x" * 600, "max_tokens": 1400, "ignore_eos": True}
        with served.held(), raw.connect(served.url) as connection:
            connection.sendall(raw.request("/v1/completions", "POST", body=body))
            served.wait_until(lambda: not served.idle())
            response = served.client.post("/v1/completions", json=body)
            assert response.status_code == 429
            assert response.headers["retry-after"] == "1"
        served.wait_until_idle()
        assert served.client.post("/v1/completions", json={**body, "max_tokens": 1}).is_success


def test_a_full_queue_is_a_429(serve: Any) -> None:
    with serve(engine={"max_running": 1, "max_queue": 2}) as served:
        body = {"prompt": "x", "max_tokens": 2000, "ignore_eos": True}
        # It keeps the only place meanwhile.
        with served.held(passes=1), raw.connect(served.url) as connection:
            connection.sendall(raw.request("/v1/completions", "POST", body=body))
            served.wait_until(lambda: served.engine.stats.running)
            response = served.client.post("/v1/completions", json={**body, "n": 4, "stream": True})
        assert response.status_code == 429
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "queue_full"
        served.wait_until_idle()


def test_callers_do_not_share_what_is_cached(locked: Any) -> None:
    """Or one could find out, by the time it takes, what another has asked."""
    body = {"prompt": "the secret of alice " * 10, "max_tokens": 1}
    keys = [KEY, "key-of-bob", KEY, "key-of-bob"]
    cached = [
        locked.client.post(
            "/v1/completions", json=body, headers={"authorization": f"Bearer {key}"}
        ).json()["usage"]["prompt_tokens_details"]["cached_tokens"]
        for key in keys
    ]
    assert cached[:2] == [0, 0]
    assert min(cached[2:]) > 0


@pytest.mark.parametrize(
    ("body", "depth"),
    [
        (b"", 0), (b"[]", 1), (b'{"a": [1, {"b": []}]}', 4), (b'"[[["', 0), (b'"\\"[[["', 0),
        (b'"[[[', 0), (b'["\\\\", [', 2), (b"]]][", 0), (b"[]" * 99, 1),
        (b"[" * 1_000_000, 1_000_000),
        (b'"' + b'\\"' * 1_000_000, 0), (b'"' * 4_000_000, 0),
    ],
)  # fmt: skip
def test_nesting_is_found_in_linear_time(body: bytes, depth: int) -> None:
    began = time.thread_time()
    assert nesting(body) == depth
    assert time.thread_time() - began < 2


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\n\n  first-key \nMy API Key\n")
    keys = Keys.read(path)
    assert keys.caller(b"first-key")
    assert keys.caller(b"My API Key") != keys.caller(b"first-key")
    assert keys.caller(b"# of the team") is None
    assert keys.caller(b"") is None
    for text in ("", "# nothing\n", "short\n", "k\u00e9y-of-alice\n", "x" * 600):
        path.write_text(text)
        with pytest.raises(UserError, match=r"keys: "):
            Keys.read(path)
    with pytest.raises(UserError, match="no file of API keys"):
        Keys.read(tmp_path / "none")
