"""Peak memory of a real training step on the CPU, against what `qwen2 plan` says of it.

No peer offers this for a run of its own on the CPU, so the figure is our prediction over the
measurement. Each case is a process of its own: it takes a step of a tiny model, so that threads and
libraries have what they keep, notes its resident bytes, and takes two steps of the case. The peak
is VmHWM, which is set back before (`ru_maxrss` of a child begins at its parent's). Twice: with an
allocator that gives every freed tensor back, so that the process has what lives and no more, and
with glibc's as the trainer sets it, which keeps what it may need again.

    python benchmarks/plan_memory.py [--json] [--out FOLDER] [--rounds 5]
"""

from __future__ import annotations

import ctypes
import multiprocessing
from pathlib import Path
from typing import Any

from harness import finish, options, spread

SHAPE = {
    "vocab_size": 32768,
    "hidden_size": 512,
    "intermediate_size": 1920,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 4096,
}
MOE = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 240,
    "shared_expert_intermediate_size": 960,
}
CASES: dict[str, dict[str, Any]] = {
    "dense fp32": {"dtype": "fp32", "rows": 4},
    "dense fp32, two micro-batches": {"dtype": "fp32", "rows": 4, "micro_batches": 2},
    "tied fp32, long rows": {"dtype": "fp32", "rows": 16, "tie_word_embeddings": True},
    "mixture fp32": {"dtype": "fp32", "rows": 4, "moe": MOE},
    "dense bf16": {"dtype": "bf16", "rows": 4},
    "tied bf16, two micro-batches": {
        "dtype": "bf16", "rows": 2, "micro_batches": 2, "tie_word_embeddings": True,
    },
}  # fmt: skip
CONTEXT = 512


def status(key: str) -> int:
    """Bytes that /proc/self/status gives for `key`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def measured(exact: bool, dtype: str, rows: int, micro_batches: int = 1, **shape: Any) -> int:
    """Bytes that two training steps take at most, beyond those of a tiny model's."""
    import torch

    from qwen2.common.runtime import keep_freed_memory, set_threads
    from qwen2.model.config import ModelConfig
    from qwen2.model.decoder import Qwen2, init_weights
    from qwen2.tokens.packing import PackedBatch
    from qwen2.train.optimizers import AdamWConfig
    from qwen2.train.packed_loss import PackedLoss
    from qwen2.train.precision import MasterWeights
    from qwen2.train.step import Trainee, train_step

    def train(config: ModelConfig, context: int) -> None:
        model = Qwen2(config)
        init_weights(model, torch.Generator().manual_seed(0))
        weights = MasterWeights(model, {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
        trainee = Trainee(PackedLoss(model), weights, AdamWConfig(lr=1e-4).build(weights.masters))
        tokens = torch.randint(config.vocab_size, (rows * context,))
        positions = torch.arange(context).repeat(rows)
        batch = PackedBatch(tokens, tokens.roll(-1), positions, [context] * rows)
        for _ in range(2):
            train_step(trainee, [batch] * micro_batches, 1e-4, clip=1.0)

    if exact:
        M_MMAP_THRESHOLD = -3
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    else:
        keep_freed_memory()
    set_threads(2)
    tiny = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 256, "num_hidden_layers": 1}
    train(ModelConfig.parse(SHAPE | shape | tiny), 64)
    base = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    train(ModelConfig.parse(SHAPE | shape), CONTEXT)
    return status("VmHWM") - base


def predicted(dtype: str, rows: int, micro_batches: int = 1, **shape: Any) -> int:
    """Bytes that plan.py says."""
    from qwen2.model.config import ModelConfig
    from qwen2.train.mesh import Mesh
    from qwen2.train.plan_memory import Work, peak

    work = Work(
        ModelConfig.parse(SHAPE | shape), Mesh(dp_shard=1), CONTEXT, rows, micro_batches,
        "bf16" if dtype == "bf16" else "fp32", fused_norm=False,
    )  # fmt: skip
    return peak(work).total


def answer(connection: Any, exact: bool, case: dict[str, Any]) -> None:
    """In the child: send what is measured."""
    connection.send(measured(exact, **case))


def measure(exact: bool, case: dict[str, Any]) -> int:
    """`measured` in a process of its own."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    child = context.Process(target=answer, args=(there, exact, case))
    child.start()
    there.close()
    try:
        return int(here.recv())
    finally:
        child.join()


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    chosen = parser.parse_args()
    figures: dict[str, Any] = {}
    for name in chosen.cases:
        said = predicted(**CASES[name])
        figures[name] = {"predicted_mb": round(said / 1e6, 1)}
        for allocator, exact in (("exact", True), ("glibc", False)):
            peaks = [measure(exact, CASES[name]) for _ in range(chosen.rounds)]
            figures[name][allocator] = {
                "measured_mb": spread(peak / 1e6 for peak in peaks),
                "predicted_over_measured": spread(said / peak for peak in peaks),
            }
    finish("plan_memory", {"cases": figures}, chosen)


if __name__ == "__main__":
    main()
