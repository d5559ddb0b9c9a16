"""What every request passes before anything looks at it: the outermost layer, in plain ASGI.

Default-deny: a path is open without a key only if it is, character for character, one of a few. So
no trick with slashes, dots, percent signs or absolute URLs can make a closed path look open: at
worst it makes an open one closed. The body is read here, within bounds of size, time and nesting;
what is behind gets it whole.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets

import numpy as np
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwen2.serve.errors import ApiError
from qwen2.serve.settings import Settings

DISCARDED_BYTES = 1024 * 1024  # of a refused body, so that the client comes to read the answer
DISCARDED_SECONDS = 1.0

SECURITY_HEADERS = [
    (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*+"?', flags=re.DOTALL)
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


class Guard:
    """Lets through what may pass, with `scope["state"]["caller"]` saying whose it is.

    Args:
        app: what is guarded.
        settings: keys, host names and limits.
        open_paths: paths that need no key.
    """

    def __init__(self, app: ASGIApp, settings: Settings, open_paths: frozenset[str]) -> None:
        self._app, self._settings, self._open_paths = app, settings, open_paths
        self._held = 0  # bytes of bodies of requests under way

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # of the others, the server sends only "lifespan"
            await self._app(scope, receive, send)
            return
        send = _with_headers(send)
        body = _Body(receive)
        held = 0
        try:
            try:
                self._check_headers(scope)
                caller = self._authenticate(scope)
                await self._read(body, scope["headers"])
                if self._held + len(body.data) > self._settings.limits.bodies_bytes:
                    raise ApiError(429, "too much is being worked on", headers={"retry-after": "1"})
                self._held += (held := len(body.data))
                if nesting(body.data) > self._settings.limits.depth:
                    raise ApiError(400, f"JSON nested deeper than {self._settings.limits.depth}")
            except ApiError as error:
                await _refuse(error, body, scope, send)
                return
            except _GoneError:
                return
            scope.setdefault("state", {})["caller"] = caller
            await self._app(scope, _replay(body.data, receive), send)
        finally:
            self._held -= held

    def _check_headers(self, scope: Scope) -> None:
        limits = self._settings.limits
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if len(headers) > limits.headers:
            raise ApiError(431, f"{len(headers)} headers; at most {limits.headers}")
        size = len(scope["query_string"]) + len(scope["raw_path"])
        size += sum(len(name) + len(value) for name, value in headers)
        if size > limits.header_bytes:
            raise ApiError(431, f"{size} bytes of headers; at most {limits.header_bytes}")
        if not scope["path"].startswith("/"):
            raise ApiError(400, "a path begins with /")
        host = _only(headers, b"host")
        if host is None:
            raise ApiError(400, "exactly one Host header is wanted")
        name = re.sub(r":\d{1,5}$", "", host).lower()
        if self._settings.hosts is not None and name not in self._settings.hosts:
            raise ApiError(
                403,
                f"this server is called {' or '.join(self._settings.hosts)}, not as the Host says",
                code="host_not_allowed",
            )
        origins = [value for name, value in headers if name == b"origin"]
        if any(origin.partition(b"://")[2] != host.encode("latin-1") for origin in origins):
            raise ApiError(
                403, "web pages of other origins are not served", code="origin_not_allowed"
            )

    def _authenticate(self, scope: Scope) -> str:
        """Who is asking: "" where no keys are set, or on an open path."""
        if not self._settings.keys or scope["path"] in self._open_paths:
            return ""
        scheme, _, key = (_only(scope["headers"], b"authorization") or "").partition(" ")
        caller = self._settings.keys.caller(key.strip().encode("latin-1"))
        if caller is None or scheme.lower() != "bearer":
            raise ApiError(
                401,
                "a valid API key is wanted, as Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )
        return caller

    async def _read(self, body: _Body, headers: list[tuple[bytes, bytes]]) -> None:
        limits = self._settings.limits
        too_large = ApiError(413, f"the body is larger than {limits.body_bytes} bytes")
        length = _only(headers, b"content-length") or "0"
        if not length.isdecimal() or int(length[:20]) > limits.body_bytes:
            raise too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                while not body.complete:
                    body.data += await body.more()
                    if len(body.data) > limits.body_bytes:
                        raise too_large
        except TimeoutError:
            raise ApiError(408, f"the body took more than {limits.body_seconds:g} s") from None
        kind = (_only(headers, b"content-type") or "").partition(";")[0].strip().lower()
        # Pages of other origins may send anything but this without asking first.
        if body.data and kind != "application/json":
            raise ApiError(415, "the body is to be JSON, with Content-Type: application/json")


class _Body:
    """A request's body as it comes."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.data = b""
        self.complete = False

    async def more(self) -> bytes:
        """The next piece.

        Raises:
            _GoneError: the client has gone.
        """
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        self.complete = not message.get("more_body", False)
        piece: bytes = message.get("body", b"")
        return piece


def nesting(body: bytes) -> int:
    """How deep brackets outside of strings go, at most; in linear time, whatever the bytes."""
    brackets = _STRING.sub(b"", body).translate(None, _NO_BRACKETS)
    if not brackets:
        return 0
    codes = np.frombuffer(brackets, np.uint8)
    opening = (codes == ord("[")) | (codes == ord("{"))
    return max(0, int(np.where(opening, 1, -1).cumsum().max()))


class _GoneError(Exception):
    """The client has gone."""


def _only(headers: list[tuple[bytes, bytes]], name: bytes) -> str | None:
    """The value of a header that is there once."""
    values = [value for key, value in headers if key == name]
    return values[0].decode("latin-1") if len(values) == 1 else None


def _with_headers(send: Send) -> Send:
    request_id = f"req_{secrets.token_hex(12)}".encode()

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = {name for name, _ in message["headers"]}
            message["headers"] = [
                *message["headers"],
                *((name, value) for name, value in SECURITY_HEADERS if name not in given),
                (b"x-request-id", request_id),
            ]
        await send(message)

    return sending


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then whatever comes: the client's leaving."""
    given = False

    async def receiving() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receiving


async def _refuse(error: ApiError, body: _Body, scope: Scope, send: Send) -> None:
    """Answer; and end the connection, if the body is still on its way."""
    response = error.response()
    if not body.complete:
        if not any(name == b"expect" for name, _ in scope["headers"]):
            await _discard(body)
        response.headers["connection"] = "close"
    await response(scope, _nothing, send)


async def _discard(body: _Body) -> None:
    """Read some of what the client still sends: closing earlier would take the answer from it."""
    left = DISCARDED_BYTES
    with contextlib.suppress(TimeoutError, _GoneError):
        async with asyncio.timeout(DISCARDED_SECONDS):
            while left > 0 and not body.complete:
                left -= len(await body.more())


async def _nothing() -> Message:
    raise AssertionError("a plain response receives nothing")
