"""Two ranks of a core each against one: tokens per second of the same run, by `qwen2 train`.

Both have the same recipe, as many rows a step and one thread a process; two under torchrun share
the rows and the weights (FSDP2 over gloo). The figure of a run is the median of its steps but the
first ones; runs take turns, ratios are of pairs. It needs two idle cores.

    python benchmarks/training_ranks.py [--json] [--out FOLDER] [--rounds 5] [--steps 8]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from harness import alternate, finish, options, ratios
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.shards import write_shards

VOCABULARY, CONTEXT, ROWS = 8192, 512, 2
WARMUP = 3  # steps that are not counted


def prepare(folder: Path) -> None:
    """A tokenizer, and shards of ids at random."""
    control = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    tokenizer = Tokenizer.from_ranks({bytes([i]): i for i in range(256)}, control)
    tokenizer.save(folder / "tokenizer")
    random = np.random.default_rng(0)
    documents = [("noise", random.integers(0, 256, 400)) for _ in range(400)]
    write_shards(
        folder / "shards",
        documents,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text_id,
        tokenizer="noise",
    )


def recipe(folder: Path, steps: int) -> dict[str, Any]:
    """Of hidden size 512 and 8 layers, in fp32, which every processor has."""
    return {
        "model": {
            "vocab_size": VOCABULARY,
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        "data": str(folder / "shards"),
        "tokenizer": str(folder / "tokenizer"),
        "context": CONTEXT,
        "rows": ROWS,
        "steps": steps,
        "dtype": "fp32",
        "optimizer": {"lr": 1e-4},
        "checkpoint_every": steps,
        "threads": 1,
    }


def train(folder: Path, steps: int, ranks: int) -> float:
    """Tokens per second of all ranks together."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        path = Path(place) / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe(folder, steps) | {"out": str(out)}))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*(launch if ranks > 1 else ()), "-m", "qwen2.cli", "train", str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *command], check=True, capture_output=True, env=environment)
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return float(median(line["tokens_per_s"] for line in lines[WARMUP:]))


def main() -> None:
    """Measure and report."""
    parser = options(__doc__ or "")
    parser.add_argument("--steps", type=int, default=8, help="of each run")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        found = alternate(
            {
                "one": lambda: train(folder, chosen.steps, 1),
                "two": lambda: train(folder, chosen.steps, 2),
            },
            chosen.rounds,
        )
    figures = {
        "tokens_per_s": {name: median(each) for name, each in found.items()},
        "two_over_one": ratios(found["two"], found["one"]),
    }
    finish("training_ranks", figures, chosen)


if __name__ == "__main__":
    main()
