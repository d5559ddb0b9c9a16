"""What a training step costs: in tokens, in parameters, and for its data.

Five sizes of miniature take steps of one length, and one of them steps of five lengths; lines are
fitted by least squares. FLOPs of a step are 6·P·N and attention's, see `flops_per_token`, so its
seconds grow as they do when the share of the peak (MFU) stays. A size is warmed up by a step, and
the median of `--rounds` steps is taken, sizes in turn. The loader's time for the batches of a step
is a share of that step's. Charts go to `--figures`.

    python benchmarks/training_cost.py [--json] [--out FOLDER] [--rounds 5] [--tokens 1024]
        [--figures docs/figures]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import alternate, finish, options
from qwen2.common.plot import line_chart, standalone
from qwen2.common.runtime import keep_freed_memory
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.tokens.loader import PackedLoader
from qwen2.tokens.shards import Shards, write_shards
from qwen2.train.flops import measure_matmul_peak
from qwen2.train.optimizers import AdamWConfig
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.precision import MasterWeights
from qwen2.train.step import Trainee, train_step

CONTEXT, VOCABULARY = 256, 4096
SIZES = [(256, 4), (320, 5), (384, 6), (448, 7), (512, 8)]
"""Hidden size and layers."""
MOST_LOADING = 0.01  # of a step
CPU = torch.device("cpu")


def random_shards(folder: Path, count: int = 4000) -> Shards:
    """Random ids in documents of mixed lengths, as a run reads them."""
    random = np.random.default_rng(0)
    lengths = random.integers(16, 2 * CONTEXT, count)
    documents = (("noise", random.integers(1, VOCABULARY, length)) for length in lengths)
    write_shards(folder, documents, vocab_size=VOCABULARY, end_of_text=0, tokenizer="noise")
    return Shards(folder)


class Size:
    """A miniature, and the steps that it takes."""

    def __init__(self, hidden: int, layers: int, shards: Shards) -> None:
        self.shards = shards
        self.config = ModelConfig(
            vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=4 * hidden,
            num_hidden_layers=layers, num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64, max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
        )  # fmt: skip
        model = Qwen2(self.config)
        init_weights(model, torch.Generator().manual_seed(0))
        weights = MasterWeights(model, torch.float32)
        optimizer = AdamWConfig(lr=3e-4).build(weights.masters)
        self.trainee = Trainee(PackedLoss(model), weights, optimizer)
        self.loading: list[float] = []

    def steps(self, tokens: int) -> Callable[[], float]:
        """Takes a step of so many tokens; returns its seconds, reading of data left out."""
        loader = PackedLoader(self.shards, context=CONTEXT, rows=tokens // CONTEXT, seed=0)

        def step() -> float:
            began = time.perf_counter()
            batch = next(loader)
            read = time.perf_counter()
            train_step(self.trainee, [batch], 3e-4, clip=1.0)
            seconds = time.perf_counter() - read
            self.loading.append((read - began) / (seconds + read - began))
            return seconds

        return step


def fit(points: list[tuple[float, float]]) -> dict[str, float]:
    """The line through (x, y), and how much of y's variance it explains (R²)."""
    x, y = np.array(points).T
    slope, start = np.polyfit(x, y, 1)
    left = ((y - start - slope * x) ** 2).sum() / ((y - y.mean()) ** 2).sum()
    return {"slope": float(slope), "intercept": float(start), "r_squared": float(1 - left)}


def measure(tokens: int, rounds: int, figures: Path | None, folder: Path) -> dict[str, Any]:
    """Steps of all sizes and lengths, fitted."""
    keep_freed_memory()
    shards = random_shards(folder)
    sizes = [Size(*size, shards) for size in SIZES]
    by_size = alternate({str(i): s.steps(tokens) for i, s in enumerate(sizes)}, rounds)
    lengths = [tokens * share // 4 // CONTEXT * CONTEXT for share in (1, 2, 4, 6, 8)]
    by_length = alternate({str(n): sizes[0].steps(n) for n in lengths}, rounds)
    of_tokens = [
        (float(n), statistics.median(t)) for n, t in zip(lengths, by_length.values(), strict=True)
    ]
    seconds = [statistics.median(taken) for taken in by_size.values()]
    products = [float(6 * s.config.num_parameters() * tokens) for s in sizes]
    of_products = list(zip((p / 1e9 for p in products), seconds, strict=True))
    peak = measure_matmul_peak(torch.float32, CPU)
    flops = [tokens * s.config.flops_per_token(CONTEXT) for s in sizes]
    share = statistics.median(share for size in sizes for share in size.loading)
    if figures:
        figures.mkdir(parents=True, exist_ok=True)
        for name, points, label in (
            ("tokens", of_tokens, "tokens of a step"),
            ("parameters", of_products, "6·P·N, GFLOP"),
        ):
            line = fit(points)
            ends = [(x, line["intercept"] + line["slope"] * x) for x, _ in (points[0], points[-1])]
            chart = line_chart({"measured": points, "fit": ends}, label, "seconds of a step")
            (figures / f"training_{name}.svg").write_text(standalone(chart) + "\n")
    return {
        "tokens": {"points": of_tokens, **fit(of_tokens)},
        "parameters": {"points": of_products, **fit(of_products)},
        "mfu": [round(f / s / peak, 3) for f, s in zip(flops, seconds, strict=True)],
        "loading_share_of_step": share,
        "loading_is_small": share <= MOST_LOADING,
    }


def main() -> None:
    """Measure and print."""
    parser = options(__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=4 * CONTEXT, help="of a step")
    parser.add_argument("--figures", type=Path, help="a folder for the charts")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = measure(chosen.tokens, chosen.rounds, chosen.figures, Path(place) / "shards")
    finish("training_cost", found, chosen)


if __name__ == "__main__":
    main()
