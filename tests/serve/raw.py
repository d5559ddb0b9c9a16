"""HTTP by hand, for what no client would send; and what such requests cost in memory."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit


def connect(url: str) -> socket.socket:
    """A connection that waits 20 seconds at most."""
    parts = urlsplit(url)
    assert parts.hostname
    return socket.create_connection((parts.hostname, parts.port or 80), timeout=20)


def exchange(url: str, data: bytes) -> tuple[int, bytes]:
    """Status and body of the answer to these bytes; status 0 where there is none."""
    with connect(url) as connection:
        with contextlib.suppress(ConnectionError):  # the server may have had enough
            connection.sendall(data)
        return read(connection)


def read(connection: socket.socket) -> tuple[int, bytes]:
    """Status and body of an answer, read until the body is complete or the connection ends."""
    got = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            got += piece
            head, blank, body = got.partition(b"\r\n\r\n")
            length = [
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length:")
            ]
            if blank and length and len(body) >= length[0]:
                break
    head, _, body = got.partition(b"\r\n\r\n")
    return (int(head.split()[1]) if head else 0), body


def request(
    path: str = "/v1/models",
    method: str = "GET",
    host: str = "127.0.0.1",
    headers: tuple[str, ...] = (),
    body: Any = None,
) -> bytes:
    """A request's bytes."""
    lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", *headers]
    data = b""
    if body is not None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        lines += ["Content-Type: application/json", f"Content-Length: {len(data)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + data


def resident() -> int:
    """Bytes of memory that this process has."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def assert_memory_settles(work: Callable[[], None], growth: int = 2**20, rounds: int = 20) -> None:
    """Memory must stop growing when the same is done again and again.

    Not at once: the allocator keeps, for each of several threads, what that has once used.
    """
    calm, highest, course = 0, resident(), []
    while calm < 3:
        work()
        now = resident()
        calm = calm + 1 if now - highest < growth else 0
        highest = max(highest, now)
        course.append(now // 2**20)
        assert len(course) < rounds, f"MiB: {course}"
