"""Answers that notice when nobody listens any more: server-sent events, and whole ones."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qwen2.serve.errors import ApiError, to_json

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> bytes:
    """One server-sent event. JSON on one line has no line ends, so none can be forged."""
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + to_json(data) + b"\n\n"


class EventStream(Response):
    """Server-sent events as they come; `close` is called once at the end, whoever ended it.

    An `ApiError` in the middle becomes an event, for the status has been sent long ago.
    """

    def __init__(self, events: AsyncIterator[bytes], close: Callable[[], None]) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={"cache-control": "no-store", "x-accel-buffering": "no"},
        )
        del self.headers["content-length"]
        self._events, self._close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await until_gone(receive, self._send_all(send))
        except ClientGoneError:
            pass
        finally:
            self._close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._told(self._events)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                await asyncio.sleep(0)  # let others in, even when a lot is ready
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _told(events: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        try:
            async for piece in events:
                yield piece
        except ApiError as error:
            yield event(error.body)


class ClientGoneError(Exception):
    """The client has closed the connection."""


async def until_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client goes.

    Raises:
        ClientGoneError: it has gone.
    """
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, leaving):
            each.cancel()
        await asyncio.gather(task, leaving, return_exceptions=True)


async def whole(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """The response that `work` makes, unless the client goes first; then nobody reads any."""
    try:
        return await until_gone(request.receive, work)
    except ClientGoneError:
        return Response(status_code=499)


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
