"""A connection's bounds, which uvicorn has not: for headers, for clients that stop reading, and for
the number of connections."""

from __future__ import annotations

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from qwen2.serve.errors import ApiError
from qwen2.serve.settings import Limits


class BoundedProtocol(H11Protocol):
    """HTTP/1.1 on one connection; `limits` is set by a subclass (see `bounded_protocol`)."""

    limits: Limits

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.limits.connections:
            self._end(ApiError(503, "too many connections", headers={"retry-after": "1"}))
        else:
            self._watch_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._header_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_headers()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch_headers()

    def send_400_response(self, msg: str) -> None:
        self._end(ApiError(400, msg))

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall_timer = self.loop.call_later(self.limits.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()

    def _watch_headers(self) -> None:
        """Time runs while a request's headers are wanted, unless the connection idles between two
        requests, which uvicorn bounds itself."""
        wanted = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is None
        if not wanted and self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None
        elif wanted and self._header_timer is None:
            self._header_timer = self.loop.call_later(self.limits.header_seconds, self._too_slow)

    def _too_slow(self) -> None:
        seconds = self.limits.header_seconds
        self._end(ApiError(408, f"the headers took more than {seconds:g} s"))

    def _end(self, error: ApiError) -> None:
        """Answer with an error and close; in the middle of another answer, only close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR):
            response = error.response()
            lines = [b"HTTP/1.1 %d Error" % error.status_code]
            lines += [name + b": " + value for name, value in response.raw_headers]
            head = b"\r\n".join([*lines, b"connection: close"])
            self.transport.write(head + b"\r\n\r\n" + bytes(response.body))
        self.transport.close()


def bounded_protocol(limits: Limits) -> type[BoundedProtocol]:
    """The protocol with these limits, for uvicorn to make instances of."""
    return type("Protocol", (BoundedProtocol,), {"limits": limits})
