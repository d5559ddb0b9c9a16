"""Our own engine: model, "none", "int8" or "int4", number of threads."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from child import answer

import qwen2
from qwen2.common.runtime import set_threads
from qwen2.inference import Engine, EngineConfig, EngineThread, SamplingParams, bench
from qwen2.model.hub import load as load_model


def load(name: str, quantize: str, threads: str) -> Mapping[str, Callable[..., Any]]:
    """An engine that computes every prompt, for all but the calls that say otherwise."""
    set_threads(int(threads))
    before = peak_memory()
    model, tokenizer = load_model(
        name, dtype="bf16", quantize=None if quantize == "none" else quantize, inference=True
    )
    engine = Engine(model, tokenizer, EngineConfig(prefix_cache=False))
    probes: list[bench.MemoryProbe] = []

    def decode(prompt: list[int], new: int) -> dict[str, float]:
        done = bench.decode(engine, prompt, new)
        return {"tokens_per_second": done.tokens_per_second, "overhead": done.overhead}

    def bandwidth() -> float:
        if not probes:  # memory that `memory` must not see
            probes.append(bench.MemoryProbe())
        return probes[0].gb_per_second()

    def memory(prompt: list[int], new: int) -> dict[str, int]:
        """Bytes at the peak, once so much has been generated; to be called first."""
        bench.decode(engine, prompt, new)
        return {
            "peak": peak_memory(),
            "before": before,
            "weights": bench.weight_bytes(model),
            "kv": (len(prompt) + new) * model.config.kv_bytes_per_token("bf16"),
        }

    return {
        "decode": decode,
        "prefill": lambda prompt: {
            "tokens_per_second": len(prompt) / bench.first_token(engine, prompt)
        },
        "bandwidth": bandwidth,
        "bytes_per_token": lambda: bench.bytes_per_token(model),
        "memory": memory,
        "repeated": lambda prefix, tails: repeated(cached(engine), prefix, tails),
        "together": lambda prompts, new: together(engine, prompts, new),
        "version": lambda: f"qwen2 {qwen2.__version__}",
    }


def cached(engine: Engine) -> Engine:
    """A new engine of the same model, with a cache of prefixes."""
    return Engine(engine.model, engine.tokenizer)


def repeated(engine: Engine, prefix: list[int], tails: list[list[int]]) -> list[float]:
    """Seconds to the first token of the same prefix with each tail in turn."""
    return [bench.first_token(engine, prefix + tail) for tail in tails]


def together(engine: Engine, prompts: list[list[int]], new: int) -> list[dict[str, Any]]:
    """Requests that arrive at once, on a thread as a server has it; what serve.bench.Sample has."""
    thread = EngineThread(engine)
    thread.start()
    ended = threading.Semaphore(0)
    samples: list[dict[str, Any]] = []
    params = SamplingParams(max_tokens=new, ignore_eos=True)
    for prompt in prompts:
        sample = {"due": time.perf_counter(), "stamps": [], "ended": 0.0, "tokens": new}
        samples.append(sample)

        def stamp(output: Any, sample: dict[str, Any] = sample) -> None:
            sample["stamps"] += [time.perf_counter()] * len(output.token_ids)
            if output.finish_reason is not None:
                sample["ended"] = time.perf_counter()
                ended.release()

        thread.submit(prompt, params, on_output=stamp)
    for _ in prompts:
        ended.acquire()
    thread.stop()
    return samples


def peak_memory() -> int:
    """Bytes of this process's memory at its largest."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(x.split()[1]) for x in lines if x.startswith("VmHWM"))
    except OSError:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    answer(load)
