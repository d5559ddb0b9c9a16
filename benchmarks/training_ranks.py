"""Two ranks of a core each against one: tokens per second of the same run, by `qwen2 train`.

Both have the same recipe, as many rows a step and one thread a process; two under torchrun share
the rows and the weights (FSDP2 over gloo). What the machine lets two cores do is measured besides:
two runs of one rank at once, which share nothing but caches and memory. The figure of a run is the
median of its steps but the first; runs take turns, ratios are of pairs. It needs two idle cores.

    python benchmarks/training_ranks.py [--json] [--out FOLDER] [--rounds 5] [--steps 4] [--rows 8]
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

VOCABULARY, CONTEXT = 8192, 512
WARMUP = 1  # steps that are not counted


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


def recipe(folder: Path, steps: int, rows: int) -> dict[str, Any]:
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
        "rows": rows,
        "steps": steps,
        "dtype": "fp32",
        "optimizer": {"lr": 1e-4},
        "checkpoint_every": steps,
        "threads": 1,
    }


class Run:
    """`qwen2 train` in processes of its own."""

    def __init__(self, values: dict[str, Any], ranks: int) -> None:
        self.place = tempfile.TemporaryDirectory()
        self.out = Path(self.place.name) / "run"
        path = Path(self.place.name) / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | {"out": str(self.out)}))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*(launch if ranks > 1 else ()), "-m", "qwen2.cli", "train", str(path)]
        self.process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def tokens_per_second(self) -> float:
        """Of all ranks together, once it has ended."""
        _, errors = self.process.communicate()
        if self.process.returncode:
            raise SystemExit(errors)
        lines = (self.out / "metrics.jsonl").read_text().splitlines()
        self.place.cleanup()
        return float(median(json.loads(line)["tokens_per_s"] for line in lines[WARMUP:]))


def main() -> None:
    """Measure and report."""
    parser = options(__doc__ or "")
    parser.add_argument("--steps", type=int, default=4, help="of each run")
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder)
        values = recipe(folder, chosen.steps, chosen.rows)

        def at_once(runs: int, ranks: int) -> float:
            return sum(run.tokens_per_second() for run in [Run(values, ranks) for _ in range(runs)])

        found = alternate(
            {
                "one_rank": lambda: at_once(1, 1),
                "two_ranks": lambda: at_once(1, 2),
                "two_runs": lambda: at_once(2, 1),
            },
            chosen.rounds,
        )
    figures = {
        "tokens_per_step": chosen.rows * CONTEXT,
        "tokens_per_s": {name: median(each) for name, each in found.items()},
        "two_ranks_over_one": ratios(found["two_ranks"], found["one_rank"]),
        "two_runs_over_one": ratios(found["two_runs"], found["one_rank"]),
    }
    finish("training_ranks", figures, chosen)


if __name__ == "__main__":
    main()
