"""Running the server: its socket, its signals, its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from qwen2.common.errors import UserError
from qwen2.serve.connection import bounded_protocol
from qwen2.serve.settings import LOOPBACK_NAMES, Keys, Limits

BACKLOG = 512
TO_SAY_GOODBYE = 5.0  # seconds for the last answers to be read


def bind(host: str, port: int) -> socket.socket:
    """A socket that others can connect to, once it listens; port 0 takes a free one.

    Raises:
        UserError: the address can't be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        hint = "; choose another --port" if error.errno == errno.EADDRINUSE else ""
        raise UserError(f"{host}:{port}: {error.strerror or error}{hint}") from None
    return bound


def allowed_hosts(bound: socket.socket, host: str, keys: Keys) -> tuple[str, ...] | None:
    """The names that clients may call a server at this address by; None: any.

    Raises:
        UserError: others than this machine could reach it, and no key is set.
    """
    address = ipaddress.ip_address(bound.getsockname()[0])
    if address.is_loopback:
        own = f"[{host}]" if ":" in host else host.lower()
        return tuple(dict.fromkeys((*LOOPBACK_NAMES, own)))
    if not keys:
        raise UserError(
            f"--host {host}: whoever reaches this machine could use the model; "
            "set keys with --api-key-file"
        )
    return None


def url_of(bound: socket.socket) -> str:
    """The address for a browser."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def uvicorn_config(app: ASGIApp, limits: Limits, shutdown_seconds: float) -> uvicorn.Config:
    """uvicorn with our limits: one process, HTTP/1.1 alone, no log of requests."""
    return uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        http=bounded_protocol(limits),
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        backlog=BACKLOG,
        h11_max_incomplete_event_size=limits.header_bytes,
        timeout_keep_alive=limits.keep_alive_seconds,
        timeout_graceful_shutdown=shutdown_seconds,  # type: ignore[arg-type]  # any number does
    )


def run(
    app: ASGIApp,
    bound: socket.socket,
    limits: Limits,
    ready: str,
    drain_seconds: float,
    stop: Callable[[], None],
) -> None:
    """Serve until a signal; print `ready` when requests are answered.

    What still runs `drain_seconds` after the signal is ended by `stop`, which may block.
    """
    config = uvicorn_config(app, limits, drain_seconds + TO_SAY_GOODBYE)
    Server(config, ready, drain_seconds, stop).run(sockets=[bound])


class Server(uvicorn.Server):
    """Ends on SIGTERM or Ctrl-C when what runs is finished, at once on a second Ctrl-C.

    uvicorn itself would then raise the signal again, and so not exit with 0.
    """

    def __init__(
        self, config: uvicorn.Config, ready: str, drain_seconds: float, stop: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._ready, self._drain_seconds, self._stop = ready, drain_seconds, stop

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(self._ready, flush=True)  # noqa: T201 (the one line that scripts wait for)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        loop = asyncio.get_running_loop()
        # Requests that are ended tell their clients so; uvicorn would only drop the connections.
        timer = loop.call_later(self._drain_seconds, loop.run_in_executor, None, self._stop)
        await super().shutdown(sockets)
        timer.cancel()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {each: signal.signal(each, self._on_signal) for each in _SIGNALS}
        try:
            yield
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        self.force_exit = self.should_exit and number == signal.SIGINT
        self.should_exit = True


_SIGNALS = (signal.SIGINT, signal.SIGTERM)
