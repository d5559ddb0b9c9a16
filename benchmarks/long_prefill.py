"""Prefill of long prompts with Dual Chunk Attention against ordinary attention, and its memory.

Speed: both fill their own cache with the same tokens of real text, in turn, one piece of 2,048
tokens each, so that a machine whose speed drifts changes both; the chunks are those of a model
trained on 8,192 tokens, so that all three kinds of parts occur. Memory: one prefill in a
process of its own, with what `--context` turns on for the model as it is; the peak at some lengths.

    python benchmarks/long_prefill.py MODEL [--json] [--out FOLDER] [--length 32768]
        [--memory 8192,16384,32768,65536]
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

# The harness imports qwen2, which sets OMP_WAIT_POLICY: before torch.
from harness import finish, options, ratios, spread

PIECE = 2048  # tokens of a pass, as in generation
CHUNK, WINDOW = 8192, 512


def tokens_of_text(tokenizer: Any, count: int) -> list[int]:
    """`count` ids of the standard library's longest documents."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    ids: list[int] = []
    for name in ("pydoc_data/topics.py", "_pydecimal.py", "turtle.py", "typing.py"):
        ids += tokenizer.encode((folder / name).read_text(encoding="utf-8"))
        if len(ids) >= count:
            return ids[:count]
    raise SystemExit("the standard library's documents are too short for this length")


def prefill(model: Any, ids: list[int], first: int, store: Any, scheme: Any) -> float:
    """Seconds of one pass over ids[first : first + PIECE], after those before it in `store`."""
    import torch

    from qwen2.model.cache import PagedAttention

    start = time.perf_counter()
    ids = ids[first : first + PIECE]
    attention = PagedAttention(store, [torch.arange(first + len(ids))], [len(ids)], scheme)
    device = model.device
    positions, last = attention.positions(device), attention.last_rows(device)
    logits = model(torch.tensor(ids), positions, attention, last)
    assert logits.isfinite().all()
    return time.perf_counter() - start


def measure_speed(name: str, length: int) -> dict[str, Any]:
    """Tokens a second of both, and the ratio piece by piece."""
    import torch

    import qwen2
    from qwen2.model.attention import CAUSAL
    from qwen2.model.cache import KVStore
    from qwen2.model.config import DualChunk
    from qwen2.model.dual_chunk import DualChunkAttention

    model, tokenizer = qwen2.load(name)
    model.fuse_projections()
    ids = tokens_of_text(tokenizer, length)
    chunks = DualChunk(chunk_size=CHUNK, local_size=WINDOW, original_max_position_embeddings=CHUNK)
    schemes = {"dual_chunk": DualChunkAttention(chunks), "plain": CAUSAL}
    stores = {k: KVStore(model.config, length, model.dtype, model.device) for k in schemes}
    seconds: dict[str, list[float]] = {key: [] for key in schemes}
    with torch.inference_mode():
        for key, scheme in schemes.items():  # a warm-up of the kernels
            prefill(model, ids[:64], 0, stores[key], scheme)
        for number, first in enumerate(range(0, length, PIECE)):
            for key in list(schemes)[:: 1 if number % 2 else -1]:
                seconds[key].append(prefill(model, ids, first, stores[key], schemes[key]))
            print(first + PIECE, {k: round(v[-1], 2) for k, v in seconds.items()}, file=sys.stderr)
    total = {key: sum(values) for key, values in seconds.items()}
    return {
        "length": length,
        "tokens_per_second": round(length / total["dual_chunk"], 1),
        "plain_tokens_per_second": round(length / total["plain"], 1),
        "whole_prefill_speed_over_plain": round(total["plain"] / total["dual_chunk"], 4),
        "dual_chunk_prefill_ratio": ratios(seconds["plain"], seconds["dual_chunk"]),
        "last_quarter_ratio": ratios(
            *(v[-len(v) // 4 :] for v in (seconds["plain"], seconds["dual_chunk"]))
        ),
        "seconds_of_pieces": {key: spread(values) for key, values in seconds.items()},
    }


def measure_memory(name: str, lengths: list[int]) -> dict[str, Any]:
    """Peak resident bytes when so many tokens are in: one prefill, in a process of its own."""
    command = [sys.executable, __file__, name, "--one", ",".join(map(str, lengths))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout)
    growth = [
        (b["peak_rss_bytes"] - a["peak_rss_bytes"]) / (b["length"] - a["length"])
        for a, b in itertools.pairwise(found)
    ]
    return {"memory": found, "peak_rss_bytes_per_further_token": [round(x) for x in growth]}


def one(name: str, lengths: list[int]) -> None:
    """Prefill as `--context` has it; print seconds and peak memory at each of `lengths`."""
    import torch

    import qwen2
    from qwen2.model.cache import KVStore

    model, tokenizer = qwen2.load(name, context=131_072)
    model.fuse_projections()
    ids = tokens_of_text(tokenizer, max(lengths))
    store = KVStore(model.config, max(lengths), model.dtype, model.device)
    before, seconds, found = forget_peak(), 0.0, []
    with torch.inference_mode():
        for first in range(0, max(lengths), PIECE):
            seconds += prefill(model, ids, first, store, model.scheme)
            length = min(first + PIECE, max(lengths))
            if length in lengths:
                figures = {
                    "length": length,
                    "seconds": round(seconds, 1),
                    "tokens_per_second": round(length / seconds, 1),
                    "peak_rss_bytes": resident("VmHWM"),
                    "rss_bytes_before": before,
                    "kv_cache_bytes": length * model.config.kv_bytes_per_token("bf16"),
                }
                print(figures, file=sys.stderr)
                found.append(figures)
    print(json.dumps(found))


def forget_peak() -> int:
    """Count the peak from here on, that of loading being past (Linux); what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def resident(field: str) -> int:
    """Bytes of a field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith(field))


def main() -> None:
    """Measure and print."""
    parser = options(__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", default=os.environ.get("QWEN2_REAL_CHECKPOINT"))
    parser.add_argument("--length", type=int, default=32_768, help="tokens of the comparison")
    parser.add_argument("--memory", default="8192,16384,32768,65536", help="lengths, or nothing")
    parser.add_argument("--one", help="lengths to measure memory at, in this process")
    chosen = parser.parse_args()
    if chosen.one:
        one(chosen.model, [int(x) for x in chosen.one.split(",")])
        return
    lengths = [int(x) for x in chosen.memory.split(",") if x]
    if not chosen.model:
        parser.error("MODEL is missing; or set QWEN2_REAL_CHECKPOINT")
    figures = {"model": Path(chosen.model).name}
    figures |= measure_speed(chosen.model, chosen.length) if chosen.length else {}
    figures |= measure_memory(chosen.model, lengths) if lengths else {}
    finish("long_prefill", figures, chosen)


if __name__ == "__main__":
    main()
