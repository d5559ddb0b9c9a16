"""From the engine's thread to the event loop: requests in flight, and their outputs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from qwen2.common.errors import UserError
from qwen2.inference import EngineDead, EngineThread, Output, QueueFull, Request, SamplingParams
from qwen2.serve.errors import ApiError
from qwen2.serve.metrics import Course, Metrics

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """One prompt, and what is wanted of it."""

    prompt: Sequence[int]
    params: SamplingParams
    embed: bool = False


class Flight:
    """Requests that one HTTP request made. Iterate for (index, output) until all have ended;
    `cancel` ends what has not, and does nothing when called again."""

    def __init__(self, engine: EngineThread, metrics: Metrics) -> None:
        self.requests: list[Request] = []
        self._engine, self._metrics = engine, metrics
        self._loop = asyncio.get_running_loop()
        self._outputs: asyncio.Queue[tuple[int, Output]] = asyncio.Queue()
        self._gone = False

    def launch(self, jobs: Sequence[Job], salt: str) -> None:
        """Submit all jobs, or none, on any thread; none for a client who has left.

        Raises:
            ApiError: a job can't be done (400), or not now (429, 503).
        """
        try:
            for index, job in enumerate(jobs):
                if self._gone:
                    return
                request = self._engine.submit(
                    job.prompt,
                    job.params,
                    salt=salt,
                    embed=job.embed,
                    on_output=partial(self._on_output, index, Course(len(job.prompt), job.embed)),
                )
                self.requests.append(request)
                if self._gone:  # the client left meanwhile
                    self._engine.cancel(request)
        except (UserError, QueueFull, EngineDead) as error:
            self.cancel()
            raise translated(error) from error

    def cancel(self, index: int | None = None) -> None:
        """End all requests, or one."""
        if index is not None:
            self._engine.cancel(self.requests[index])
            return
        self._gone = True
        for request in self.requests:
            if request.finish_reason is None:
                self._engine.cancel(request)

    async def __aiter__(self) -> AsyncIterator[tuple[int, Output]]:
        running = len(self.requests)
        while running:
            index, output = await self._outputs.get()
            if output.finish_reason is not None:
                running -= 1
            yield index, output

    def _on_output(self, index: int, course: Course, output: Output) -> None:
        """Called on the engine's thread, perhaps before `submit` has returned."""
        self._metrics.observe(course, output)
        self._loop.call_soon_threadsafe(self._outputs.put_nowait, (index, output))


def translated(error: UserError | QueueFull | EngineDead) -> ApiError:
    """What the engine raised, in the words of HTTP."""
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", headers={"retry-after": "1"})
    if isinstance(error, EngineDead):
        return ApiError(503, "the engine is not running", code="engine_not_running")
    return ApiError(400, str(error))


def failure(output: Output) -> ApiError | None:
    """The error of a request that did not end as it should."""
    if output.finish_reason == "error" and (output.error or "").startswith("grammar"):
        return ApiError(400, str(output.error))  # what it asked for can't be, as came out late
    if output.finish_reason == "error":
        return ApiError(500, "the engine failed on this request", code="engine_error")
    if output.finish_reason == "cancelled":
        return ApiError(503, "the server is shutting down", code="shutting_down")
    return None


async def in_thread(
    pool: ThreadPoolExecutor, work: Callable[[], T], abandoned: Callable[[], None]
) -> T:
    """The result of `work` on a thread of `pool`; `abandoned` is called when the caller is
    cancelled meanwhile, for a thread goes on."""
    future = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        abandoned()
        future.add_done_callback(lambda done: done.cancelled() or done.exception())
        raise
