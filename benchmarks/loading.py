"""Loading a checkpoint: time and peak memory, ours beside transformers and the gguf package.

Each load is a process of its own; the clock starts when the libraries are imported and stops when
every weight has been read once, so that a mapping pays for its pages too. Peak memory is the growth
of the resident set over the libraries', as a share of the weights. Ratios are our speed over the
peer's (greater than 1: we are faster). The gguf package's loader is its reader and `dequantize`,
tensor by tensor, to bf16.

    python benchmarks/loading.py MODEL.gguf [--json] [--rounds 5]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from harness import finish, options, ratios, spread

LIMIT = 1.15  # of the weights: the most that a load may take


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default=os.environ.get("QWEN2_REAL_CHECKPOINT"))
    parser.add_argument("--load", nargs=3, metavar=("WHO", "PATH", "DTYPE"), help="one load")
    chosen = parser.parse_args()
    if chosen.load:
        print(json.dumps(load_once(*chosen.load)))
        return
    if not chosen.model:
        parser.error("give a GGUF file, or set QWEN2_REAL_CHECKPOINT")
    finish("loading", measure(chosen.model, chosen.rounds), chosen)


def measure(gguf_file: str, rounds: int) -> dict[str, Any]:
    """Interleaved loads of the GGUF file and of the same weights in safetensors, bf16."""
    from qwen2.model.hub import load, save

    with tempfile.TemporaryDirectory() as scratch:
        folder = f"{scratch}/model"
        save(*load(gguf_file), Path(folder))
        loads = {
            "safetensors_bf16": ("ours", folder, "bf16"),
            "safetensors_bf16_transformers": ("transformers", folder, "bf16"),
            "safetensors_bf16_to_fp32": ("ours", folder, "fp32"),
            "safetensors_bf16_to_fp32_transformers": ("transformers", folder, "fp32"),
            "gguf_to_bf16": ("ours", gguf_file, "bf16"),
            "gguf_to_bf16_package": ("gguf", gguf_file, "bf16"),
        }
        results: dict[str, list[dict[str, float]]] = {name: [] for name in loads}
        for _ in range(rounds):
            for name, arguments in loads.items():
                results[name].append(in_a_process(arguments))

    def seconds(name: str) -> list[float]:
        return [result["seconds"] for result in results[name]]

    pairs = [(name, peer) for name in loads for peer in loads if peer.startswith(f"{name}_tr")]
    pairs.append(("gguf_to_bf16", "gguf_to_bf16_package"))
    peaks = {name: [result["peak_over_weights"] for result in results[name]] for name in loads}
    ours = [name for name, (who, _, _) in loads.items() if who == "ours"]
    return {
        **{
            f"{mine}_ratio": ratios(seconds(peer), seconds(mine))  # times: the other way round
            for mine, peer in pairs
        },
        **{f"{name}_seconds": spread(seconds(name)) for name in loads},
        **{f"{name}_peak_over_weights": spread(peaks[name]) for name in loads},
        "within_limit": all(max(peaks[name]) < LIMIT for name in ours),
    }


def in_a_process(arguments: tuple[str, str, str]) -> dict[str, float]:
    """Load in a fresh process."""
    command = [sys.executable, __file__, "--load", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return figures


def load_once(who: str, path: str, dtype: str) -> dict[str, float]:
    """Seconds and peak memory of one load in this process."""
    run = {"ours": ours, "transformers": transformers, "gguf": package}[who](path, dtype)
    before = kilobytes("VmRSS:")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    began = time.perf_counter()
    weights = list(run())
    for weight in weights:
        weight.detach().view(-1)[::1024].sum()  # touches every page
    seconds = time.perf_counter() - began
    size = sum(weight.nbytes for weight in weights) / 1024
    return {"seconds": seconds, "peak_over_weights": (kilobytes("VmHWM:") - before) / size}


def ours(path: str, dtype: str) -> Callable[[], Iterable[Any]]:
    from qwen2.model.hub import load_model

    return lambda: load_model(path, dtype=dtype, device="cpu").parameters()


def transformers(path: str, dtype: str) -> Callable[[], Iterable[Any]]:
    import torch
    from transformers import Qwen2ForCausalLM

    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    return lambda: Qwen2ForCausalLM.from_pretrained(path, dtype=wanted).parameters()


def package(path: str, dtype: str) -> Callable[[], Iterable[Any]]:
    import gguf
    import torch

    assert dtype == "bf16"
    return lambda: [
        torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type)).bfloat16()
        for tensor in gguf.GGUFReader(path).tensors
    ]


def kilobytes(key: str) -> int:
    """A figure of this process's memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
