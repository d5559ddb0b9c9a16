"""Peak memory of real training steps on the CPU, against what `qwen2 plan` says of them.

No peer offers this for a run of its own on the CPU, so the figure is our prediction over the
measurement. Each case is a recipe, which processes of its own train as `qwen2 train` does: one for
each rank of its mesh, with a gloo group where there are several. They take two steps of a tiny
model, so that threads, groups and libraries have what they keep, note their resident bytes, and
take two steps of the case. The peak is VmHWM, which is set back before (`ru_maxrss` of a child
begins at its parent's). Of several ranks the one is told whose figure is furthest from 1. Twice:
with an allocator that gives every freed tensor back, so that a process has what lives and no more,
and with glibc's as the trainer sets it, which keeps what it may need again.

    python benchmarks/plan_memory.py [--json] [--out FOLDER] [--rounds 5] [--cases NAME ...]
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
import socket
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
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
TINY = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 256, "num_hidden_layers": 2}
RECIPE = {
    "data": "none", "tokenizer": "none", "context": 512, "rows": 4, "steps": 2, "dtype": "fp32",
    "optimizer": {"lr": 1e-4}, "activation_checkpointing": "none", "device": "cpu", "mesh": {},
}  # fmt: skip
MIXTURE = {
    "moe": {
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 240,
        "shared_expert_intermediate_size": 960,
    }
}
TIED = {"tie_word_embeddings": True}
CASES: dict[str, dict[str, Any]] = {
    "dense fp32": {},
    "dense fp32, two micro-batches": {"accumulation": 2},
    "tied fp32, long rows": {"rows": 16, "model": TIED},
    "mixture fp32": {"model": MIXTURE},
    "dense bf16": {"dtype": "bf16"},
    "tied bf16, two micro-batches": {"dtype": "bf16", "rows": 2, "accumulation": 2, "model": TIED},
    "dense fp32, asynchronous checkpoint": {"async_checkpoints": True},
    "dense fp32, dp_shard 2": {"rows": 1, "accumulation": 2, "mesh": {"dp_shard": 2}},
    "mixture fp32, dp_shard 2, two micro-batches": {
        "rows": 1, "accumulation": 4, "mesh": {"dp_shard": 2}, "model": MIXTURE,
    },
    "mixture fp32, ep 2": {
        "rows": 1, "accumulation": 2, "mesh": {"dp_shard": 2, "ep": 2}, "model": MIXTURE,
    },
    "dense fp32, dp_replicate 2": {"rows": 1, "accumulation": 2, "mesh": {"dp_replicate": 2}},
    "dense fp32, tp 2": {"rows": 2, "mesh": {"tp": 2}},
    "dense fp32, cp 2": {"rows": 2, "mesh": {"cp": 2}},
    "dense fp32, pp 2": {"rows": 1, "accumulation": 4, "mesh": {"pp": 2}},
}  # fmt: skip
"""What each has beside or instead of RECIPE and SHAPE; a step's rows are of all ranks."""


def values_of(case: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a case, but for its `out`."""
    return RECIPE | case | {"model": SHAPE | case.get("model", {})}


def status(key: str) -> int:
    """Bytes that /proc/self/status gives for `key`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))


def measured(exact: bool, values: dict[str, Any], threads: int) -> int:
    """Bytes that two training steps take at most on this rank, beyond those of a tiny model's."""
    import torch

    from qwen2.common.runtime import keep_freed_memory, set_threads
    from qwen2.model.config import ModelConfig
    from qwen2.tokens.packing import PackedBatch
    from qwen2.train.checkpointer import Checkpointer
    from qwen2.train.checkpoints import RunState
    from qwen2.train.first_weights import RandomWeights
    from qwen2.train.pretrain import PretrainRecipe
    from qwen2.train.stage import make_trainee
    from qwen2.train.step import train_step
    from qwen2.train.world import open_world

    recipe = PretrainRecipe.parse(values, "case")
    assert recipe.model is not None

    def train(config: ModelConfig, context: int) -> None:
        trainee = make_trainee(RandomWeights(config, recipe.seed), recipe, world)
        own = recipe.plan[0].shared(world.mesh.dp, world.mesh.pp)
        torch.manual_seed(world.dp_rank)
        tokens = torch.randint(config.vocab_size, (own.rows * context,))
        positions = torch.arange(context).repeat(own.rows)
        batch = PackedBatch(tokens, tokens.roll(-1), positions, [context] * own.rows)
        folder = recipe.out / str(config.hidden_size)
        with Checkpointer(folder, 1, asynchronous=recipe.async_checkpoints) as checkpoints:
            for step in range(recipe.total_steps):
                train_step(trainee, [batch] * own.accumulation, 1e-4, clip=1.0)
                if recipe.async_checkpoints:
                    of = trainee.weights.masters, trainee.optimizer, {}, recipe, config
                    checkpoints.save(RunState(step), *of)

    if exact:
        M_MMAP_THRESHOLD = -3
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    else:
        keep_freed_memory()
    set_threads(threads)
    with open_world(recipe.mesh, recipe.model, recipe.context, recipe.device) as world:
        train(ModelConfig.parse(recipe.model.model_dump() | TINY), 64)
        base = status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")
        train(recipe.model, recipe.context)
        peak = status("VmHWM") - base
        world.any(False)  # nobody leaves while others are at it
    return peak


def predicted(case: dict[str, Any]) -> list[int]:
    """Bytes that the plan says, of each rank."""
    from qwen2.train.plan import read_job
    from qwen2.train.plan_memory import peak
    from qwen2.train.plan_search import own_plan
    from qwen2.train.plan_time import Cluster

    ranks = rank_count(case)
    job = read_job(values_of(case) | {"out": "none"}, "case")
    work = own_plan(job, Cluster(ranks, math.inf)).work
    return [peak(work, rank * work.mesh.pp // ranks).total for rank in range(ranks)]


def rank_count(case: dict[str, Any]) -> int:
    """Ranks of a case's mesh."""
    return math.prod(size for name, size in case.get("mesh", {}).items() if name != "ep")


def answer(pipe: Connection, environment: dict[str, str], *how: Any) -> None:
    """In the child: send what is measured."""
    os.environ.update(environment)
    pipe.send(measured(*how))


def measure(exact: bool, case: dict[str, Any]) -> list[int]:
    """`measured` of each rank, in processes of their own."""
    ranks, context = rank_count(case), multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with tempfile.TemporaryDirectory() as out:
        how = exact, values_of(case) | {"out": out}, max(1, 2 // ranks)
        pipes, children = [], []
        for rank in map(str, range(ranks)):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks)} | place
            here, there = context.Pipe()
            child = context.Process(target=answer, args=(there, own if ranks > 1 else {}, *how))
            child.start()
            there.close()
            pipes.append(here)
            children.append(child)
        try:
            return [int(pipe.recv()) for pipe in pipes]
        finally:
            for child in children:
                child.join(10)
                child.kill()


def worst(said: list[int], rounds: list[list[int]]) -> dict[str, Any]:
    """Of the rank whose prediction is furthest from what is measured."""
    found = [[own / peaks[rank] for peaks in rounds] for rank, own in enumerate(said)]
    rank = max(range(len(said)), key=lambda rank: abs(math.log(median(found[rank]))))
    return {
        "rank": rank,
        "predicted_mb": round(said[rank] / 1e6, 1),
        "measured_mb": spread(peaks[rank] / 1e6 for peaks in rounds),
        "predicted_over_measured": spread(found[rank]),
    }


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    chosen = parser.parse_args()
    figures: dict[str, Any] = {}
    for name in chosen.cases:
        said, case = predicted(CASES[name]), CASES[name]
        figures[name] = {
            allocator: worst(said, [measure(exact, case) for _ in range(chosen.rounds)])
            for allocator, exact in (("exact", True), ("glibc", False))
        }
    finish("plan_memory", {"cases": figures}, chosen)


if __name__ == "__main__":
    main()
