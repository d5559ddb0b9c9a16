"""onnxruntime-genai: the folder that its model builder wrote, and the number of threads."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnxruntime_genai as og
from child import answer


def load(folder: str, threads: str) -> Mapping[str, Callable[..., Any]]:
    """The model on the CPU."""
    config = og.Config(folder)
    session = {"intra_op_num_threads": int(threads)}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)

    def run(prompt: list[int], new: int) -> tuple[float, float]:
        """Seconds to the first token, and for `new` more."""
        length = len(prompt) + 1 + new
        params = og.GeneratorParams(model)
        # min_length: it must not end before.
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = og.Generator(model, params)
        started = time.perf_counter()
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        generator.generate_next_token()
        first = time.perf_counter()
        for _ in range(new):
            generator.generate_next_token()
        ended = time.perf_counter()
        return first - started, ended - first

    return {
        "decode": lambda prompt, new: {"tokens_per_second": new / run(prompt, new)[1]},
        "prefill": lambda prompt: {"tokens_per_second": len(prompt) / run(prompt, 0)[0]},
        "version": lambda: f"onnxruntime-genai {og.__version__}",
    }


if __name__ == "__main__":
    answer(load)
