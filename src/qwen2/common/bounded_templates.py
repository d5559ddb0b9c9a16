"""A template in a process of its own, which is ended when it takes too long or too much memory.

Jinja's sandbox bounds neither, and no bound inside the process holds: a thread can't be stopped in
the middle of `10 ** 10 ** 8`, which keeps Python's lock too. So a server, which must outlive
whatever checkpoint it was given, compiles and renders the checkpoint's template in a child:

    parent, a line each    {"source", "names"}, then {"values", "traced"} as often as wanted
    child, a line each     {} when it is compiled, then {"text"}; or {"error"}

all in JSON. A child that overstays is killed and the next rendering starts another.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen2.common.errors import UserError
from qwen2.common.templates import MAX_RENDERED, Template, check_size

START_SECONDS = 60.0  # to start Python and compile: plenty on a busy machine
RENDER_SECONDS = 5.0  # a rendering takes milliseconds
MEMORY = 512 * 1024 * 1024  # bytes beyond what the child has when it starts

_LONGEST_LINE = 6 * MAX_RENDERED + 100  # JSON spells a character with six at most


class BoundedTemplate:
    """The same as `Template`, in a child process with bounds; safe to call from several threads.

    Raises:
        UserError: as `Template`; or it can't be compiled within the bounds.
    """

    def __init__(
        self, source: str, names: Mapping[str, str], seconds: float = RENDER_SECONDS
    ) -> None:
        check_size(source)
        self._setup = {"source": source, "names": dict(names)}
        self._seconds = seconds
        self._lock = threading.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        with self._lock:
            self._start()

    def render(self, values: Mapping[str, Any], *, traced: bool = False) -> str:
        """The template filled with `values`, which are JSON.

        Raises:
            UserError: the template refuses them, or exceeds a bound.
        """
        with self._lock:
            if self._child is None or self._child.poll() is not None:
                self._end()
                self._start()
            text: str = self._ask({"values": values, "traced": traced}, self._seconds)["text"]
            return text

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def _start(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "qwen2.common.bounded_templates"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # Ctrl-C is the parent's to deal with
        )
        self._ask(self._setup, START_SECONDS)

    def _ask(self, question: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """One line to the child and one back."""
        child = self._child
        assert child is not None
        assert child.stdin is not None
        assert child.stdout is not None
        with _killed_after(child, seconds):
            try:
                child.stdin.write(json.dumps(question).encode() + b"\n")
                child.stdin.flush()
                line = child.stdout.readline(_LONGEST_LINE)
            except BrokenPipeError:
                line = b""
        if not line.endswith(b"\n"):
            self._end()
            raise UserError(
                f"chat template: it was ended for taking more than {seconds:g} s or "
                f"{MEMORY // 2**20} MiB"
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise UserError(answer["error"])
        return answer

    def _end(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.communicate()


@contextlib.contextmanager
def _killed_after(child: subprocess.Popen[bytes], seconds: float) -> Iterator[None]:
    """Kill `child` unless the block ends in time; reading from it then ends too."""
    timer = threading.Timer(seconds, child.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _limit_memory() -> None:
    statm = Path("/proc/self/statm")
    if statm.is_file():  # elsewhere than on Linux, time alone is bounded
        import resource

        now = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))


def _limit_time() -> None:
    """Even should the parent die meanwhile, a rendering ends."""
    with contextlib.suppress(ImportError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(used.ru_utime + used.ru_stime + START_SECONDS)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))


def _child() -> None:
    """Answer lines until there are no more."""
    _limit_memory()
    template = None
    for line in sys.stdin.buffer:
        _limit_time()
        question = json.loads(line)
        try:
            if template is None:
                template = Template(question["source"], question["names"])
                answer = {}
            else:
                answer = {"text": template.render(question["values"], traced=question["traced"])}
        except UserError as error:
            answer = {"error": str(error)}
        except (MemoryError, RecursionError) as error:
            answer = {"error": f"chat template: {type(error).__name__}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _child()
