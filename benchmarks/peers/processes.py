"""Peers as processes: a child that answers on a pipe, and llama.cpp's server over HTTP.

Each is loaded once, answers one call at a time and sleeps meanwhile. What is not there is `Absent`,
with the reason.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import httpx

HERE = Path(__file__).parent
PATIENCE = 300.0  # seconds to load
OURS = ("OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE")  # what `import qwen2` sets for itself


class Absent(Exception):  # noqa: N818
    """A peer that cannot be measured here."""


class Side(Protocol):
    """What is measured: speeds in tokens per second, and more."""

    version: str

    def decode(self, prompt: Sequence[int], new: int) -> dict[str, float]:
        """Of `new` tokens after the first."""
        ...

    def prefill(self, prompt: Sequence[int]) -> dict[str, float]:
        """Of the prompt, to the first token."""
        ...


class Child:
    """A script of this folder in some Python; any call is `child.call(name, ...)`."""

    def __init__(self, python: str, script: str, *arguments: object) -> None:
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the child)
        command = [python, str(HERE / script), *map(str, arguments)]
        environment = None if script == "our_child.py" else plain_environment()
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words,
                text=True, env=environment,
            )  # fmt: skip
        except OSError as error:
            raise Absent(f"{python}: {error.strerror}") from None
        try:
            self._read()
            self.version: str = self.call("version")
        except Exception:
            self.close()
            raise

    def call(self, name: str, **arguments: Any) -> Any:
        """The child's answer."""
        assert self._process.stdin is not None
        print(json.dumps({"do": name, **arguments}), file=self._process.stdin, flush=True)
        return self._read()

    def decode(self, prompt: Sequence[int], new: int) -> dict[str, float]:
        """See `Side`."""
        return self.call("decode", prompt=list(prompt), new=new)

    def prefill(self, prompt: Sequence[int]) -> dict[str, float]:
        """See `Side`."""
        return self.call("prefill", prompt=list(prompt))

    def close(self) -> None:
        """End it."""
        end(self._process)
        self._words.close()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise Absent(f"it ended: {last_line(self._words)}")
        answer = json.loads(line)
        if "error" in answer:
            raise Absent(answer["error"])
        return answer["result"]


class LlamaServer:
    """llama-server on a free port; its own clock tells the speeds, so that HTTP costs it nothing.

    The cheapest greedy sampler is chosen, and no cache of prompts.
    """

    def __init__(self, folder: Path, model: Path, threads: int, *flags: str) -> None:
        binary = folder / "llama-server"
        for needed in (binary, model):
            if not needed.exists():
                raise Absent(f"no {needed.name}")
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the server)
        port = free_port()
        command = [
            str(binary), "--model", str(model), "--host", "127.0.0.1", "--port", str(port),
            "--threads", str(threads), "--threads-batch", str(threads), "--offline",
            "--samplers", "top_k", "--top-k", "1", "--no-cache-prompt", "--cache-ram", "0", *flags,
        ]  # fmt: skip
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._words, stderr=self._words,
            env=plain_environment(),
        )  # fmt: skip
        self.url = f"http://127.0.0.1:{port}"
        self._client = httpx.Client(base_url=self.url, timeout=PATIENCE, trust_env=False)
        try:
            self._wait()
            build = self._client.get("/props").json().get("build_info", "unknown build")
        except BaseException:
            self.close()
            raise
        self.version = f"llama.cpp {build}"

    def decode(self, prompt: Sequence[int], new: int) -> dict[str, float]:
        """See `Side`. Its time begins at the first token."""
        timings = self._complete(prompt, new + 1)
        tokens = timings["predicted_n"] - 1
        return {"tokens_per_second": 1000 * tokens / timings["predicted_ms"]}

    def prefill(self, prompt: Sequence[int]) -> dict[str, float]:
        """See `Side`."""
        timings = self._complete(prompt, 1)
        assert timings["prompt_n"] == len(prompt), "it has used a cache"
        return {"tokens_per_second": 1000 * len(prompt) / timings["prompt_ms"]}

    def close(self) -> None:
        """End it."""
        self._client.close()
        end(self._process)
        self._words.close()

    def _complete(self, prompt: Sequence[int], new: int) -> dict[str, float]:
        body = {"prompt": list(prompt), "n_predict": new, "ignore_eos": True}
        answer = self._client.post("/completion", json=body)
        answer.raise_for_status()
        return answer.json()["timings"]

    def _wait(self) -> None:
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if self._process.poll() is not None:
                raise Absent(f"llama-server ended: {last_line(self._words)}")
            with contextlib.suppress(httpx.TransportError):
                if self._client.get("/health").status_code == httpx.codes.OK:
                    return
            time.sleep(0.1)
        raise Absent("llama-server was not ready in time")


def plain_environment() -> dict[str, str]:
    """What a peer would find without us."""
    return {name: value for name, value in os.environ.items() if name not in OURS}


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def end(process: subprocess.Popen[Any]) -> None:
    """End a process, by force if it doesn't in time."""
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_line(words: Any) -> str:
    """The last thing that a process said."""
    words.seek(0)
    lines = [line.strip() for line in words.read().splitlines() if line.strip()]
    return lines[-1] if lines else "without a word"


@contextlib.contextmanager
def closing(*sides: Any) -> Iterator[None]:
    """End all of them after use."""
    try:
        yield
    finally:
        for side in sides:
            side.close()
