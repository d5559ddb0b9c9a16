"""What ranks that are not there would keep, against the closed forms of the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from qwen2.common.config import read_values
from qwen2.common.errors import UserError
from qwen2.common.recipes import find_recipe
from qwen2.model.config import PUBLISHED, ModelConfig
from qwen2.train.asked import Asked, read_asked
from qwen2.train.dry_run import DryRun, dry_run, holding
from qwen2.train.mesh import Mesh
from qwen2.train.plan import make_plan, read_job
from qwen2.train.plan_memory import Work, moments
from qwen2.train.plan_parameters import stage_shares
from qwen2.train.plan_time import Cluster

SIZES = {
    "0.5b": (256, {"cp": 2}),  # 896 rows do not divide by 256
    "1.5b": (16, {"tp": 2}),
    "7b": (64, {"dp_replicate": 2, "cp": 2}),
    "57b-a14b": (64, {"ep": 8, "tp": 2}),
    "72b": (256, {"tp": 4}),
}
"""Ranks of a cluster for each, and a mesh."""


def shipped(size: str, stage: str, mesh: dict[str, int]) -> tuple[dict[str, Any], str]:
    """The values of a size's recipe of a stage, and its name; nothing that it names is there."""
    promised = [f"model.published={size}"]
    if stage == "long_context":
        name, given = stage, [f"init=out/{size}/model", f"out=out/{size}-long", *promised]
    else:
        name, given = size, promised if size == "57b-a14b" else []
    path = find_recipe(name)
    overrides = [*given, *(f"mesh.{key}={value}" for key, value in mesh.items())]
    return read_values(path, overrides), str(path)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "long_context"])
@pytest.mark.parametrize("size", SIZES)
def test_shipped_recipes_keep_what_the_plan_says(size: str, stage: str) -> None:
    world_size, mesh = SIZES[size]
    values, where = shipped(size, stage, mesh)
    found = dry_run(read_asked(values, where), world_size)
    assert found.model.num_parameters() == PUBLISHED[size].num_parameters()
    (kept,) = found.holdings
    job = read_job(values, where)
    plan = make_plan(job, Cluster(world_size, 80e9), found.mesh, [1], "full")
    *_, update = moments(plan.work)
    assert (kept.weights, kept.gradients) == (update.weights, update.gradients)
    # The optimizer has a counter of steps beside, for each weight.
    assert update.optimizer == pytest.approx(kept.optimizer, rel=2e-4)
    assert kept.total == pytest.approx(update.total, rel=2e-4)
    # Gathered units have padding where shares do not come out even, of a row a weight at most.
    shares = stage_shares(job.model, found.mesh, 0)
    assert 2 * shares.root <= kept.gathered["root"] <= 1.01 * 2 * shares.root
    layer = kept.gathered["layer"] + kept.gathered.get("experts", 0)
    assert 2 * shares.layer <= layer <= 1.08 * 2 * shares.layer


def small(tiny: ModelConfig, mesh: dict[str, int], **changes: Any) -> Asked:
    values = {
        "model": tiny.model_dump(), "mesh": mesh, "data": "none", "tokenizer": "none",
        "out": "none", "context": 64, "rows": 4, "accumulation": 2, "steps": 1,
        "optimizer": {"lr": 1e-3}, **changes,
    }  # fmt: skip
    return read_asked(values, "recipe")


@pytest.mark.parametrize(
    "mesh", [{}, {"tp": 2}, {"dp_replicate": 2}, {"ep": 2}, {"tp": 2, "ep": 4}]
)
def test_no_rank_keeps_more_than_the_first(tiny: ModelConfig, mesh: dict[str, int]) -> None:
    moe: dict[str, Any] = {
        "num_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 36,
    }  # fmt: skip
    changes = {"vocab_size": 322, "intermediate_size": 103}  # which nothing divides
    config = ModelConfig.parse(
        {**tiny.model_dump(), **changes, "moe": moe if "ep" in mesh else None}
    )
    asked = small(config, mesh)
    resolved = Mesh(**mesh).resolve(8, config, 64)
    every = [holding(asked, resolved, rank) for rank in range(8)]
    assert every[0].parameters == stage_shares(config, resolved, 0).kept
    assert every[0].total == max(each.total for each in every)
    if not mesh:  # nothing is there twice, so that the sum is the model
        assert sum(each.parameters for each in every) == config.num_parameters()


@pytest.mark.parametrize(("dtype", "weights"), [("fp32", 4), ("bf16", 6)])
def test_one_process_has_masters_beside_its_model(
    tiny: ModelConfig, dtype: str, weights: int
) -> None:
    (kept,) = dry_run(small(tiny, {}, dtype=dtype), 1).holdings
    parameters = tiny.num_parameters()
    assert (kept.weights, kept.gradients) == (weights * parameters, 4 * parameters)
    assert kept.optimizer == pytest.approx(8 * parameters, rel=0.001)


@pytest.mark.parametrize("ranks", [1, 4])
def test_muon_keeps_one_moment_of_matrices(tiny: ModelConfig, ranks: int) -> None:
    recipe = {"optimizer": {"kind": "muon", "lr": 1e-3}}
    kept = dry_run(small(tiny, {}, **recipe), ranks).holdings[0].optimizer
    work = Work(tiny, Mesh(dp_shard=ranks), 64, 1, 1, optimizer="muon")
    *_, update = moments(work)
    assert update.optimizer == pytest.approx(kept, rel=0.01)  # counters of a tiny model's steps
    assert kept < 0.8 * dry_run(small(tiny, {}), ranks).holdings[0].optimizer


def test_nothing_is_left_behind(tiny: ModelConfig, tmp_path: Path) -> None:
    found: DryRun = dry_run(small(tiny, {}, out=str(tmp_path / "out")), 4)
    assert found.mesh == Mesh(dp_shard=4)
    assert not dist.is_initialized()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("mesh", "ranks", "says"),
    [
        ({"tp": 3}, 4, "tp 3 is 3 ranks, but the world has 4"),
        ({"ep": 2}, 4, "the model is dense"),
        ({"dp_shard": 16}, 16, "4 x 2 rows, which 16 ranks cannot share evenly"),
    ],
)
def test_a_mesh_that_does_not_fit_is_one_line(
    tiny: ModelConfig, mesh: dict[str, int], ranks: int, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        dry_run(small(tiny, mesh), ranks)


def test_every_phase_must_fit(tiny: ModelConfig) -> None:
    phases = [{"steps": 1}, {"steps": 1, "rows": 1, "accumulation": 1}]
    with pytest.raises(UserError, match="1 x 1 rows, which 4 ranks cannot share evenly"):
        dry_run(small(tiny, {}, steps=None, phases=phases), 4)
