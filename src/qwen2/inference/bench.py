"""How fast an engine is on this machine: decode, prefill, and what bounds the former.

A decode step at batch 1 reads every weight once, so its bound is the memory's bandwidth over the
weights' bytes; `memory_bandwidth` measures the one, and `bytes_per_token` counts the others.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qwen2.inference.engine import Engine
from qwen2.inference.request import Request
from qwen2.inference.runner import Batch
from qwen2.inference.sampling import SamplingParams
from qwen2.model.decoder import Qwen2

PROBE_BYTES = 1 << 29  # 16 times the largest cache in sight
PROBE_PIECE = 1 << 21  # read at a time: a thread's share of the cache


PLAIN_IDS = 94  # of byte-level BPE, its first: printable ASCII


def random_prompt(length: int, *seed: int) -> list[int]:
    """Ids that every Qwen tokenizer has, in an order that no cache of prefixes has seen."""
    chosen = random.Random(str(seed))
    return [chosen.randrange(PLAIN_IDS) for _ in range(length)]


@dataclass(frozen=True)
class Decode:
    """`tokens` after the first took `seconds`, of which the model's own pass took `in_model`."""

    tokens: int
    seconds: float
    in_model: float

    @property
    def tokens_per_second(self) -> float:
        """Speed at batch 1."""
        return self.tokens / self.seconds

    @property
    def overhead(self) -> float:
        """Share of the time that the engine adds: scheduling, sampling, detokenizing."""
        return 1 - self.in_model / self.seconds


def decode(engine: Engine, prompt: Sequence[int], tokens: int) -> Decode:
    """Time `tokens` that follow the prompt and a first one."""
    run, in_model = engine.runner.run, 0.0

    def timed(batch: Batch) -> Tensor:
        nonlocal in_model
        started = time.perf_counter()
        result = run(batch)
        in_model += time.perf_counter() - started
        return result

    request = _submit(engine, prompt, tokens + 1)
    try:
        while not request.output:
            engine.step()
        before = len(request.output)
        engine.runner.run = timed  # type: ignore[method-assign]
        started = time.perf_counter()
        while request.finish_reason is None:
            engine.step()
        seconds = time.perf_counter() - started
    finally:
        engine.runner.run = run  # type: ignore[method-assign]
        engine.cancel(request)
    return Decode(len(request.output) - before, seconds, in_model)


def first_token(engine: Engine, prompt: Sequence[int]) -> float:
    """Seconds from `submit` to the first token."""
    started = time.perf_counter()
    request = _submit(engine, prompt, 1)
    try:
        while request.finish_reason is None:
            engine.step()
    finally:
        engine.cancel(request)
    return time.perf_counter() - started


def _submit(engine: Engine, prompt: Sequence[int], tokens: int) -> Request:
    return engine.submit(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True))


def bytes_per_token(model: Qwen2) -> int:
    """Bytes of weights that a decode step of a dense model reads; all of them if it is tied."""
    total = weight_bytes(model)
    if model.config.tie_word_embeddings:
        return total
    return total - sum(x.nbytes for x in model.model.embed_tokens.state_dict().values())


def weight_bytes(model: Qwen2) -> int:
    """Bytes of all weights, each counted once."""
    tensors = {(x.data_ptr(), x.nbytes) for x in model.state_dict().values()}
    return sum(size for _, size in tensors)


class MemoryProbe:
    """Reads much memory on huge pages with torch's number of threads, as decoding does."""

    def __init__(self, size: int = PROBE_BYTES) -> None:
        # numpy asks the kernel for huge pages.
        self._pieces = np.ones(size // 8, dtype=np.int64).reshape(-1, PROBE_PIECE // 8)

    def gb_per_second(self) -> float:
        """Bandwidth in 10^9 bytes a second, the best of three."""
        threads = torch.get_num_threads()
        shares = np.array_split(self._pieces, threads)
        best = 0.0
        with ThreadPoolExecutor(threads) as pool:
            for _ in range(3):
                started = time.perf_counter()
                list(pool.map(_read, shares))
                best = max(best, self._pieces.nbytes / (time.perf_counter() - started))
        return best / 1e9


def _read(pieces: Iterable[NDArray[np.int64]]) -> None:
    for piece in pieces:
        piece.max()  # without the interpreter's lock
