"""Decode and prefill beside transformers: the same weights in bf16, the same threads, in turn.

The peer is Qwen2ForCausalLM as it comes (eager, SDPA, its DynamicCache), called directly, without
the further cost of its `generate`. Ours is the whole step with sampling and detokenizing.

    python benchmarks/generation.py MODEL.gguf [--json] [--rounds 5] [--threads 2]
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import qwen2  # noqa: F401  before torch: sets OMP_WAIT_POLICY for both sides

# isort: split
import torch
import transformers

from harness import alternate, finish, options, ratios, spread
from qwen2.common.runtime import set_threads
from qwen2.inference import Engine, EngineConfig, SamplingParams
from qwen2.model.hub import load, save

PROMPT, NEW = 64, 32


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=os.environ.get("QWEN2_REAL_CHECKPOINT"))
    parser.add_argument("--threads", type=int)
    chosen = parser.parse_args()
    if not chosen.model:
        parser.error("give a model, or set QWEN2_REAL_CHECKPOINT")
    threads = set_threads(chosen.threads)
    figures = measure(chosen.model, chosen.rounds)
    finish("generation", {**figures, "threads": threads}, chosen)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Tokens per second of both sides, and their ratios."""
    model, tokenizer = load(name, dtype="bf16")
    with tempfile.TemporaryDirectory() as scratch:
        save(model, tokenizer, Path(scratch) / "model")
        other = transformers.Qwen2ForCausalLM.from_pretrained(
            Path(scratch) / "model", dtype=torch.bfloat16
        ).eval()
    # The same prompts come again and again, and are to be computed each time.
    engine = Engine(model, tokenizer, EngineConfig(prefix_cache=False))
    text = tokenizer.encode("\n".join(Path(__file__).read_text() for _ in range(4)))
    figures: dict[str, Any] = {}
    prompt = text[:PROMPT]
    runs: dict[str, dict[str, Callable[[], float]]] = {
        "decode": {
            "ours": lambda: our_decode(engine, prompt),
            "peer": lambda: their_decode(other, prompt),
        }
    }
    for length in (512, 2048):
        ids = (text * (1 + length // len(text)))[:length]
        runs[f"prefill_{length}"] = {
            "ours": lambda ids=ids: our_prefill(engine, ids),
            "peer": lambda ids=ids: their_prefill(other, ids),
        }
    for what, sides in runs.items():
        speed = alternate(sides, rounds)
        figures[f"{what}_ratio"] = ratios(speed["ours"], speed["peer"])
        figures[f"{what}_tokens_per_second"] = spread(speed["ours"])
        figures[f"{what}_transformers_tokens_per_second"] = spread(speed["peer"])
    return figures


def our_decode(engine: Engine, prompt: list[int]) -> float:
    """Tokens per second after the prompt."""
    request = engine.submit(prompt, SamplingParams(max_tokens=NEW + 2, ignore_eos=True))
    engine.step()
    started = time.perf_counter()
    for _ in range(NEW):
        engine.step()
    seconds = time.perf_counter() - started
    engine.cancel(request)
    return NEW / seconds


def our_prefill(engine: Engine, ids: list[int]) -> float:
    """Prompt tokens per second, to the first token."""
    started = time.perf_counter()
    engine.generate([ids], SamplingParams(max_tokens=1))
    return len(ids) / (time.perf_counter() - started)


@torch.inference_mode()
def their_decode(model: Any, prompt: list[int]) -> float:
    """Tokens per second after the prompt."""
    result = model(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    started = time.perf_counter()
    for _ in range(NEW):
        token = result.logits[:, -1].argmax(-1, keepdim=True)
        result = model(token, past_key_values=result.past_key_values, use_cache=True)
    return NEW / (time.perf_counter() - started)


@torch.inference_mode()
def their_prefill(model: Any, ids: list[int]) -> float:
    """Prompt tokens per second, to the first token."""
    started = time.perf_counter()
    model(torch.tensor([ids]), use_cache=True, logits_to_keep=1).logits.argmax(-1)
    return len(ids) / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
