"""openvino-genai: a folder that optimum-cli wrote, or a .gguf file, and the number of threads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from child import answer


def load(path: str, threads: str) -> Mapping[str, Callable[..., Any]]:
    """The model on the CPU, tuned for one request at a time, without a cache of prefixes."""
    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = 4096
    scheduler.cache_size = 1  # GB
    pipeline = genai.LLMPipeline(
        path,
        "CPU",
        scheduler_config=scheduler,
        INFERENCE_NUM_THREADS=int(threads),
        PERFORMANCE_HINT="LATENCY",
    )

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        """Seconds to the first token, and for `new` more."""
        config = genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = 1 + new, True, False
        ids = ov.Tensor(np.array([prompt], dtype=np.int64))
        mask = ov.Tensor(np.ones((1, len(prompt)), dtype=np.int64))
        started = time.perf_counter()
        result = pipeline.generate(genai.TokenizedInputs(ids, mask), config)
        seconds = time.perf_counter() - started
        if len(result.tokens[0]) != 1 + new:
            raise RuntimeError(f"{len(result.tokens[0])} tokens, {1 + new} were asked for")
        first = result.perf_metrics.get_ttft().mean / 1000
        return first, seconds - first

    return {
        "decode": lambda prompt, new: {"tokens_per_second": new / run(prompt, new)[1]},
        "prefill": lambda prompt: {"tokens_per_second": len(prompt) / run(prompt, 0)[0]},
        "version": lambda: f"openvino-genai {genai.__version__}",
    }


if __name__ == "__main__":
    answer(load)
