"""Tasks on a Ray cluster, by Ray Data (extra `ray`): the same tasks, the same files.

The folder of the run and the sources must be the same paths on all nodes (a shared file system),
and the package must be installed on them. Ray schedules one task a CPU, starts a task again when
its node dies, and finds its cluster as it always does (`RAY_ADDRESS`, or `ray start` on this
machine); without one, it makes one of this machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from qwen2.common.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


class RayWorkers:
    """All CPUs of the cluster.

    Raises:
        UserError: Ray is not installed, or its cluster cannot be reached.
    """

    def __init__(self, stopped: Callable[[], str | None]) -> None:
        try:
            import ray
            import ray.data
        except ImportError:
            raise UserError("--engine ray needs Ray: pip install 'qwen2[ray]'") from None
        if not ray.is_initialized():
            try:
                address = os.environ.get("RAY_ADDRESS")
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, RuntimeError) as error:
                raise UserError(f"Ray's cluster cannot be reached: {error}") from None
        ray.data.DataContext.get_current().enable_progress_bars = False
        self.stopped = stopped

    def map(self, work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        """What `work` returns for each task, as they finish."""
        import ray.data

        if not tasks:
            return

        def done(row: dict[str, Any]) -> dict[str, Any]:
            # As a result, for Ray would wrap the exception in its own and lose it.
            try:
                return {"result": work(row["item"]), "error": None}
            except UserError as error:
                return {"result": None, "error": str(error)}

        data = ray.data.from_items(list(tasks), override_num_blocks=len(tasks)).map(done)
        for row in data.iter_rows():
            if row["error"] is not None:
                raise UserError(row["error"])
            yield row["result"]
            if self.stopped():
                return
