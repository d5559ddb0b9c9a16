"""What the choices of the mixture of experts are worth, in miniature (report section 2.2.2).

At equal active parameters and tokens, over three seeds, held-out bits per byte of

    fine          32 experts of 64 units, 4 a token, and shared ones of 256
    coarse        8 experts of 256 units, 1 a token, and shared ones of 256
    no shared     36 experts of 64 units, 8 a token, none shared
    upcycled      "fine" from a dense model by the report's procedure, then trained as long
    copied        the same from plain copies: no shuffle, nothing at random again
    dense         that dense model trained further, with half the active units

all on the same text of this machine. "fine" is what upcycling is compared with from scratch: it has
the same shape, and as many tokens as the upcycled ones get after the dense model's own.

    python benchmarks/experts.py [--seeds 3] [--steps 128] [--work FOLDER] [--svg FILE] [--json]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The harness imports qwen2, which sets OMP_WAIT_POLICY: before torch.
from harness import finish, options

CONTEXT, ROWS = 256, 16
SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "max_position_embeddings": CONTEXT,
}
DATA = [
    "vocab_size=4096",
    "tokenizer_megabytes=4",
    "corpus.megabytes={code: 4, docstrings: 3, reference: 1, prose: 3, multilingual: 0.5}",
]


def mixture(experts: int, per_token: int, size: int, shared: int) -> dict[str, int]:
    """The `moe` part of a shape."""
    return {
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": size,
        "shared_expert_intermediate_size": shared,
    }


SCRATCH = {
    "fine": mixture(32, 4, 64, 256),
    "coarse": mixture(8, 1, 256, 256),
    "no shared": mixture(36, 8, 64, 0),
}
UPCYCLED = {"upcycled": "report", "copied": "copy"}


class Bench:
    """The data, and training runs on it."""

    def __init__(self, work: Path, steps: int) -> None:
        from qwen2.common.recipes import find_recipe
        from qwen2.corpus import HELD_OUT, read_documents
        from qwen2.pipeline.quickstart import STAGES, QuickstartRecipe
        from qwen2.pipeline.stages import run_stages
        from qwen2.tokenizer import Tokenizer

        self.work, self.steps = work, steps
        recipe = QuickstartRecipe.load(find_recipe("quickstart"), DATA)
        self.data = run_stages(STAGES[:3], work / "data", recipe).folder
        self.tokenizer = Tokenizer.load(self.data / "tokenizer")
        by_kind: dict[str, str] = {}
        for document in read_documents(self.data / "corpus" / HELD_OUT):
            if document.kind != "multilingual":
                by_kind[document.kind] = by_kind.get(document.kind, "") + document.text[:4000]
        self.texts = [text[:24_000] for text in by_kind.values()]

    def bits(self, model: Any) -> float:
        """Held-out bits per byte."""
        from qwen2.evaluate.score import Score, score_text

        scores = (score_text(model, self.tokenizer, text, CONTEXT) for text in self.texts)
        return sum(scores, Score()).bits_per_byte

    def train(
        self, name: str, seed: int, shape: dict[str, Any] | None, init: Path | None = None
    ) -> tuple[Path, list[tuple[int, float]], dict[str, Any]]:
        """The model, its held-out bits by step, and the last line of the training log."""
        from qwen2.pipeline.quickstart.data import TRAIN_SHARDS
        from qwen2.train.pretrain import PretrainRecipe, pretrain

        recipe = PretrainRecipe.parse(
            {
                "model": shape,
                "init": str(init) if init else None,
                "data": self.data / TRAIN_SHARDS,
                "tokenizer": self.data / "tokenizer",
                "out": self.work / f"{name.replace(' ', '-')}-{seed}",
                "context": CONTEXT,
                "rows": ROWS,
                "steps": self.steps,
                "optimizer": {"lr": 2e-3},
                "schedule": {"kind": "cosine", "warmup": self.steps // 10, "floor": 0.1},
                "seed": seed,
                "checkpoint_every": self.steps,
                "keep": 1,
                "evaluate_every": max(1, self.steps // 4),
            }
        )
        result = pretrain(recipe, lambda model: {"bits": self.bits(model)})
        assert result.model is not None
        lines = [json.loads(line) for line in result.metrics.read_text().splitlines()]
        curve = [(x["step"], x["evaluation"]["bits"]) for x in lines if "evaluation" in x]
        return result.model, curve, [line for line in lines if "loss" in line][-1]


def measure(chosen: Any, work: Path) -> dict[str, Any]:
    """All arms over all seeds."""
    from qwen2.common.plot import line_chart, standalone
    from qwen2.model.hub import load_config
    from qwen2.model.upcycle import UpcycleConfig, upcycle

    bench = Bench(work, chosen.steps)
    curves: dict[str, list[list[tuple[int, float]]]] = {}
    sizes: dict[str, dict[str, Any]] = {}

    def run(name: str, seed: int, shape: dict[str, Any] | None, init: Path | None = None) -> Path:
        model, curve, last = bench.train(name, seed, shape, init)
        curves.setdefault(name, []).append(curve)
        config = load_config(model)
        sizes[name] = {
            "parameters": config.num_parameters(),
            "active_parameters": config.num_active_parameters(),
            **({"expert_entropy": last["expert_entropy"]} if config.moe else {}),
        }
        print(name, seed, curve[-1], file=sys.stderr)
        return model

    for seed in range(chosen.seeds):
        for name, moe in SCRATCH.items():
            run(name, seed, {**SHAPE, "moe": moe})
        dense = run("dense before", seed, SHAPE)
        run("dense", seed, None, dense)
        for name, init in UPCYCLED.items():
            folder = work / f"{name}-{seed}-start"
            if not folder.exists():
                made = UpcycleConfig.parse(
                    {
                        "experts": 32,
                        "experts_per_token": 4,
                        "expert_size": 64,
                        "shared_size": 256,
                        "init": init,
                        "seed": seed,
                    }
                )
                upcycle(dense, folder, made)
            run(name, seed, None, folder)
    if chosen.svg:
        lines = {name: mean_curve(runs) for name, runs in curves.items() if name != "dense before"}
        chosen.svg.write_text(standalone(line_chart(lines, "step", "held-out bits per byte")))
    final = {name: [curve[-1][1] for curve in runs] for name, runs in curves.items()}
    return {
        "tokens": chosen.steps * ROWS * CONTEXT,
        "seeds": chosen.seeds,
        "arms": {
            name: {
                "bits_per_byte": [round(x, 4) for x in values],
                "mean": round(statistics.mean(values), 4),
                "std": round(statistics.stdev(values), 4) if len(values) > 1 else None,
                **sizes[name],
            }
            for name, values in final.items()
        },
        "differences": {
            f"{a} - {b}": paired(final[a], final[b])
            for a, b in (
                ("fine", "coarse"),
                ("fine", "no shared"),
                ("upcycled", "copied"),
                ("upcycled", "fine"),
                ("upcycled", "dense"),
            )
        },
    }


def paired(ours: Sequence[float], other: Sequence[float]) -> dict[str, Any]:
    """Mean and spread of the differences seed by seed; less than 0: the first is better."""
    apart = [a - b for a, b in zip(ours, other, strict=True)]
    spread = round(statistics.stdev(apart), 4) if len(apart) > 1 else None
    return {"mean": round(statistics.mean(apart), 4), "std": spread}


def mean_curve(runs: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[int, float]]:
    """The mean over seeds at each step."""
    return [
        (points[0][0], statistics.mean(bits for _, bits in points))
        for points in zip(*runs, strict=True)
    ]


def main() -> None:
    """Measure and print."""
    parser = options(__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=128, help="of 4,096 tokens")
    parser.add_argument("--work", type=Path, help="where runs lie, to go on after a stop")
    parser.add_argument("--svg", type=Path, help="where the chart goes")
    chosen = parser.parse_args()
    if chosen.work:
        finish("experts", measure(chosen, chosen.work), chosen)
        return
    with tempfile.TemporaryDirectory() as folder:
        finish("experts", measure(chosen, Path(folder)), chosen)


if __name__ == "__main__":
    main()
