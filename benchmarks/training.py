"""Training speed and memory of a 47M miniature: our step beside those of other trainers.

Sides, see peers/training_child.py: ours eager and compiled, the Hugging Face Trainer as it comes
and with torch.compile, and litgpt's step. They live in processes of their own and take turns, a
step each, the other way round every other round. All see the same rows, each of one document of 512
tokens; ours and the Trainer start from the same weights, and their losses are compared. MFU is over
the matrix product's peak as our process measures it before each round. Peak memory is that of two
steps of fresh processes at a vocabulary of 152k. On a machine that others use too, the ratio of
processor times is the steadier one.

    python benchmarks/training.py [--json] [--out FOLDER] [--rounds 5] [--tokens 4096]
        [--dtype bf16|fp32] [--sides ours,trainer] [--litgpt-python PYTHON]

litgpt wants other versions than transformers does, so it has an environment of its own:

    python -m venv litgpt
    litgpt/bin/pip install torch==2.13.0 litgpt==0.5.13
"""

from __future__ import annotations

import json
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

# The harness imports qwen2, which sets OMP_WAIT_POLICY: before torch, and so for the children.
from harness import finish, options, ratios, spread
from peers.processes import Absent, Child
from qwen2.common.progress import say
from qwen2.model.config import ModelConfig

CONTEXT = 512
SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1920,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 4096,
}
LARGE_VOCABULARY = 151_936
SIDES = ("ours", "ours-compiled", "trainer", "trainer-compiled", "litgpt")
SAME_WEIGHTS = ("ours", "ours-compiled", "trainer", "trainer-compiled")


def rows_of_text(count: int) -> list[list[int]]:
    """`count` rows of token ids: the standard library's code, ids numbered as they appear."""
    from qwen2.tokenizer import Tokenizer

    tokenizer = Tokenizer.qwen2()
    numbers: dict[int, int] = {}
    ids: list[int] = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        for id_ in tokenizer.encode(path.read_text(encoding="utf-8", errors="ignore")):
            ids.append(numbers.setdefault(id_, len(numbers) % SHAPE["vocab_size"]))
        if len(ids) >= count * CONTEXT:
            return [ids[i * CONTEXT : (i + 1) * CONTEXT] for i in range(count)]
    raise SystemExit("the standard library is too small for so many steps")


def write_model(config: Any, folder: str) -> None:
    """A model with first weights in the Hugging Face layout, for all sides to load."""
    import torch

    from qwen2.model.decoder import Qwen2, init_weights
    from qwen2.model.hub import save
    from qwen2.tokenizer import Tokenizer

    model = Qwen2(config)
    init_weights(model, torch.Generator().manual_seed(0))
    save(model, Tokenizer.qwen2(), Path(folder), overwrite=True)


class Benchmark:
    """What is measured, of rows in `folder`."""

    def __init__(self, chosen: Any, folder: str) -> None:
        self.chosen, self.folder = chosen, folder
        self.rows = max(1, chosen.tokens // CONTEXT)
        self.absent: dict[str, str] = {}
        text = rows_of_text((2 + chosen.rounds) * self.rows)
        Path(folder, "rows.json").write_text(json.dumps(text))
        self.model = f"{folder}/model"
        write_model(ModelConfig(**SHAPE), self.model)

    def child(self, side: str, model: str, dtype: str) -> Child:
        """A process of a side."""
        python = self.chosen.litgpt_python if side == "litgpt" else sys.executable
        if python is None:
            raise Absent("give --litgpt-python")
        rows = f"{self.folder}/rows.json"
        return Child(python, "training_child.py", side, model, rows, dtype, self.rows)

    def speed(self) -> dict[str, Any]:
        """Steps of all sides in turn, after two to warm up."""
        config = ModelConfig(**SHAPE)
        children: dict[str, Child] = {}
        for side in self.chosen.sides.split(","):
            try:
                children[side] = self.child(side, self.model, self.chosen.dtype)
                for _ in range(2):
                    children[side].call("step")
            except Absent as error:
                self.absent[side] = str(error)
                children.pop(side, None)
                say(f"{side}: {error}")
        steps: dict[str, list[list[float]]] = {side: [] for side in children}
        peaks: list[float] = []
        for number in range(self.chosen.rounds):
            peaks.append(children["ours"].call("matmul_peak"))
            for side in list(children)[:: 1 if number % 2 else -1]:
                steps[side].append(children[side].call("step"))
            say(f"round {number + 1} of {self.chosen.rounds}")
        for child in children.values():
            child.close()
        tokens = self.rows * CONTEXT
        flops = tokens * config.flops_per_token(CONTEXT)
        peak = statistics.median(peaks)
        return {
            "parameters": config.num_parameters(),
            "tokens_of_a_step": tokens,
            "matmul_peak_gflops": spread([value / 1e9 for value in peaks]),
            "sides": {side: _figures(taken, tokens, flops / peak) for side, taken in steps.items()},
            "ratios": {
                f"{mine} over {other}": _ratios(steps[mine], steps[other])
                for mine in steps
                if mine.startswith("ours")
                for other in steps
                if other != mine and (mine == "ours" or not other.startswith("ours"))
            },
            "loss_difference_to_ours": {
                side: max(abs(a[2] - b[2]) for a, b in zip(steps["ours"], taken, strict=True))
                for side, taken in steps.items()
                if side in SAME_WEIGHTS
            },
        }

    def memory(self) -> dict[str, Any]:
        """Peak bytes of ours and of the Trainer at a large vocabulary."""
        model = f"{self.folder}/large"
        write_model(ModelConfig(**{**SHAPE, "vocab_size": LARGE_VOCABULARY}), model)
        peaks = {}
        for side in ("ours", "trainer"):
            child = self.child(side, model, self.chosen.dtype)
            for _ in range(2):
                child.call("step")
            peaks[side] = child.call("memory")
            child.close()
        return {"peak_rss_bytes": peaks, "ratio": round(peaks["trainer"] / peaks["ours"], 3)}

    def rounding(self) -> dict[str, Any]:
        """`matmul: rounded` beside exact products: seconds, and losses of the same batches."""
        children = {name: self.child("ours", self.model, name) for name in ("fp32", "fp32-rounded")}
        steps: dict[str, list[list[float]]] = {name: [] for name in children}
        for _ in range(1 + self.chosen.rounds):
            for name, child in children.items():
                steps[name].append(child.call("step"))
        for child in children.values():
            child.close()
        exact, rounded = (taken[1:] for taken in steps.values())
        apart = [abs(a[2] - b[2]) for a, b in zip(exact, rounded, strict=True)]
        return {
            "ratio": ratios([t[0] for t in exact], [t[0] for t in rounded]),
            "loss_max_difference": max(apart),
        }


def _figures(steps: list[list[float]], tokens: int, least: float) -> dict[str, Any]:
    """Of the steps of one side; `least` is the seconds of a step at the peak."""
    return {
        "tokens_per_second": spread([tokens / step[0] for step in steps]),
        "mfu": spread([least / step[0] for step in steps]),
        "cpu_seconds": spread([step[1] for step in steps]),
        "losses": [round(step[2], 4) for step in steps],
    }


def _ratios(mine: list[list[float]], other: list[list[float]]) -> dict[str, Any]:
    """Our speed over the other side's: by the clock, and by processor time."""
    names = ("seconds", "cpu_seconds")
    return {n: ratios([t[i] for t in other], [t[i] for t in mine]) for i, n in enumerate(names)}


def main() -> None:
    """Measure and print."""
    import torch

    from qwen2.common.runtime import training_dtype

    parser = options(__doc__.partition("\n")[0])
    here = training_dtype(torch.device("cpu"))
    parser.add_argument("--tokens", type=int, default=8 * CONTEXT, help="of a step")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default=here)
    parser.add_argument("--sides", default=",".join(SIDES), help="which, by commas; ours is one")
    parser.add_argument("--parts", default="speed,memory,rounding", help="which, by commas")
    parser.add_argument("--litgpt-python", help="a Python with litgpt")
    chosen = parser.parse_args()
    figures: dict[str, Any] = {"dtype": chosen.dtype}
    parts = chosen.parts.split(",")
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(chosen, folder)
        for part in parts:
            figures[part] = getattr(benchmark, part)()
        figures["absent"] = benchmark.absent
    finish("_".join(["training", *parts]), figures, chosen)


if __name__ == "__main__":
    main()
