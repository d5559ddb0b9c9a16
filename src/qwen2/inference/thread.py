"""The engine on a thread of its own: requests from any thread, outputs by callback."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Sequence

from qwen2.common.progress import say
from qwen2.inference.engine import Engine, EngineDead, QueueFull
from qwen2.inference.request import FinishReason, Output, Request
from qwen2.inference.sampling import SamplingParams


class EngineThread:
    """Steps `engine` as long as there is work; nobody else may touch it meanwhile.

    Callbacks run on this thread and must not block. An exception in a step, which no request should
    be able to cause, ends every request in flight with an error, and the engine for good.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.error: str | None = None
        self._changed = threading.Condition()
        self._arrived: list[Request] = []
        self._cancelled: list[Request] = []
        self._draining = self._stopping = self._idle = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests will be worked on."""
        return self._thread.is_alive() and self.error is None

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        salt: str = "",
        on_output: Callable[[Output], None] | None = None,
        embed: bool = False,
    ) -> Request:
        """As `Engine.submit`, from any thread; checked at once, on the caller's thread.

        Raises:
            UserError: what can never be done.
            QueueFull: as many requests wait as may, or others' grammars take too long.
            EngineDead: the engine has failed, or is about to stop.
        """
        self._check_alive()
        request = self.engine.prepare(prompt, params, salt=salt, on_output=on_output, embed=embed)
        with self._changed:
            self._check_alive()
            waiting = len(self._arrived) + len(self.engine.scheduler.waiting)
            if waiting >= self.engine.config.max_queue:
                raise QueueFull(f"{waiting} requests wait already; try again later")
            self._arrived.append(request)
            self._idle = False
            self._changed.notify_all()
        return request

    def cancel(self, request: Request) -> None:
        """End a request soon, from any thread; nothing happens if it has ended."""
        with self._changed:
            self._cancelled.append(request)
            self._changed.notify_all()

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait for those in flight; whether all ended within seconds."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(
                lambda: self._idle or not self._thread.is_alive(), timeout
            )

    def stop(self) -> None:
        """Cancel what is in flight and end the thread."""
        with self._changed:
            self._draining = self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _check_alive(self) -> None:
        if self.error is not None:
            raise EngineDead(f"the engine has failed: {self.error}")
        if self._draining or not self._thread.is_alive():
            raise EngineDead("the engine is not running, or about to stop")

    def _run(self) -> None:
        try:
            while self._take_orders():
                self.engine.step()
        except Exception as error:
            say(traceback.format_exc())
            self._end("error", f"{type(error).__name__}: {error}")
        else:
            self._end("cancelled", None)

    def _take_orders(self) -> bool:
        """Hand on what others want, waiting until there is work; False when it is to end."""
        while True:
            with self._changed:
                arrived, self._arrived = self._arrived, []
                cancelled, self._cancelled = self._cancelled, []
            # Outside the lock, for a callback may come back here.
            self.engine.scheduler.waiting.extend(arrived)
            for request in cancelled:
                self.engine.cancel(request)
            if self._stopping:
                return False
            if self.engine.has_work:
                return True
            with self._changed:
                if not (self._arrived or self._cancelled or self._stopping):
                    self._idle = True
                    self._changed.notify_all()
                    self._changed.wait()

    def _end(self, reason: FinishReason, error: str | None) -> None:
        """End all requests, and take no more."""
        with self._changed:
            self.error, self._draining = error, True
            self.engine.scheduler.waiting.extend(self._arrived)
            self._arrived = []
        self.engine.end_all(reason, error)
        with self._changed:
            self._idle = True
            self._changed.notify_all()
