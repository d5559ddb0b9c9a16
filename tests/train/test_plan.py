"""Times and traffic by hand, the search, and all shipped recipes on a plausible cluster."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from qwen2.common.config import read_values
from qwen2.common.errors import UserError
from qwen2.common.recipes import find_recipe
from qwen2.model.config import PUBLISHED
from qwen2.train.mesh import Mesh
from qwen2.train.plan import Job, make_plan, read_job
from qwen2.train.plan_memory import RECOMPUTE, Work
from qwen2.train.plan_parameters import layer_parameters, root_parameters
from qwen2.train.plan_search import best_plans, describe, divisors, merit, meshes, own_plan
from qwen2.train.plan_time import (
    Cluster,
    bubble_share,
    exchange_bandwidth,
    ring_bandwidth,
    stage_flops,
    step_time,
    traffic,
)

H100 = Cluster(devices=8, memory=80e9)
GIVEN = ["model.published=57b-a14b"]  # its `init` comes from another run


def job(name: str, *overrides: str) -> Job:
    path = find_recipe(name)
    return read_job(read_values(path, overrides), str(path))


def job_of_phases(name: str, *phases: dict[str, int], **changes: Any) -> Job:
    values = read_values(find_recipe(name), [])
    del values["tokens"]
    return read_job(values | changes | {"phases": list(phases)}, name)


LONGER = ({"steps": 900}, {"steps": 100, "context": 32_768, "rows": 1, "accumulation": 128})
"""The last tenth of the steps with rows eight times as long, and as many tokens."""


def work(size: str, rows: int = 1, micro_batches: int = 1, **mesh: int) -> Work:
    return Work(PUBLISHED[size], Mesh(**{"dp_shard": 1, **mesh}), 4096, rows, micro_batches)


@pytest.mark.parametrize(
    ("name", "devices", "overrides"),
    [("0.5b", 8, []), ("1.5b", 16, []), ("7b", 32, []), ("57b-a14b", 32, GIVEN), ("72b", 256, [])],
)
def test_shipped_recipes_have_a_mesh_that_fits(
    name: str, devices: int, overrides: list[str]
) -> None:
    asked = job(name, *overrides)
    plans = best_plans(asked, Cluster(devices, 80e9))
    for plan in plans:
        assert plan.fits
        assert plan.memory.total <= 72e9
        assert plan.work.mesh.world_size == devices
        assert plan.work.mesh.problems(asked.model, 4096) == []
        rows = plan.work.rows * plan.work.micro_batches * plan.work.mesh.dp
        assert rows == asked.phases[0].step_rows == 1024
        assert 0.2 < plan.figures()["mfu"] < 0.5001  # no more than the efficiency
    speeds = [plan.tokens_per_second for plan in plans]
    assert speeds == pytest.approx(sorted(speeds, reverse=True), rel=0.01)


def test_time_of_one_device_is_its_products() -> None:
    one = work("0.5b", rows=2, micro_batches=3)
    flops = PUBLISHED["0.5b"].flops_per_token(4096) * 6 * 4096
    time = step_time(one, Cluster(1, 80e9, flops=100e12, efficiency=0.4))
    assert time.total == time.compute == pytest.approx(flops / 40e12)
    assert set(vars(traffic(one)).values()) == {0}


def test_traffic_by_hand() -> None:
    # 7B: a layer's all-gathers and reduce-scatters pass 7/8 of 2 + 2 + 4 bytes a parameter
    model, parameters = PUBLISHED["7b"], PUBLISHED["7b"].num_parameters()
    assert traffic(work("7b", micro_batches=2, dp_shard=8)).fsdp == 2 * 8 * parameters * 7 / 8
    # two replicas: twice half of the fp32 gradients
    assert traffic(work("7b", dp_replicate=2)).hsdp == 4 * parameters
    # tp 2: of 4096 x 3584 bf16 half, 4 a layer forward and as many backward, 2 each at the ends;
    # and the gradients of all norms, twice half
    passed = 4096 * 3584 * 2 / 2
    assert traffic(work("7b", tp=2)).tp == passed * (8 * 28 + 4) + 57 * 3584 * 2
    # cp 2: half of q, the output, k and v (512 each) of 2,048 tokens, forward and backward
    assert traffic(work("7b", cp=2)).cp == 2 * 28 * 2048 * (2 * 3584 + 2 * 512) * 2 / 2
    # ep 4: 3/4 of eight rows a token, sent and returned, forward and backward
    mixture = traffic(work("57b-a14b", dp_shard=4, ep=4))
    assert mixture.ep == 2 * 28 * 2 * 4096 * 8 * 3584 * 2 * 3 / 4
    # whose experts nobody else has: only the rest is gathered
    counts = layer_parameters(PUBLISHED["57b-a14b"])
    rest = 28 * (counts.total - counts.experts.total)
    rest += root_parameters(PUBLISHED["57b-a14b"]).total
    assert mixture.fsdp == 8 * rest * 3 / 4
    # pp 2: a micro-batch's activations one way, their gradients the other
    assert traffic(work("7b", micro_batches=4, pp=2), 1).pp == 4 * 4096 * 3584 * 2
    assert model.hidden_size == 3584


def test_bubble_and_recomputation() -> None:
    assert bubble_share(work("7b", micro_batches=6, pp=3)) == 2 / 8
    plain = work("72b")
    full = Work(plain.model, plain.mesh, 4096, 1, 1, recompute="full")
    head = 6 * 152_064 * 8192 * 4096
    assert stage_flops(full, 0) - head == pytest.approx(4 / 3 * (stage_flops(plain, 0) - head))
    halves = work("72b", pp=2)
    assert stage_flops(halves, 0) + stage_flops(halves, 1) == pytest.approx(stage_flops(plain, 0))


def test_links() -> None:
    assert ring_bandwidth(H100, size=8, stride=1) == 450e9  # within a host
    assert ring_bandwidth(H100, size=16, stride=1) == 400e9  # eight cards at a host's border
    assert ring_bandwidth(H100, size=4, stride=8) == 50e9  # one card each
    assert ring_bandwidth(H100, size=8, stride=2) == 200e9
    assert exchange_bandwidth(H100, size=8, stride=1) == 450e9
    assert exchange_bandwidth(H100, size=16, stride=1) == 50e9 * 15 / 8  # 7 of 15 stay


def test_a_mesh_that_fits_is_taken_as_it_is() -> None:
    (plan,) = best_plans(job("7b", "mesh.tp=2"), Cluster(32, 80e9))
    assert plan.work.mesh == Mesh(dp_shard=16, tp=2)
    assert plan.work.rows == 4
    # One that does not is replaced.
    replaced = best_plans(job("72b", "mesh.dp_replicate=256"), Cluster(256, 80e9))
    assert all(plan.work.mesh.dp_replicate < 256 for plan in replaced)


def test_activations_are_computed_again_as_the_recipe_says() -> None:
    cluster = Cluster(32, 80e9)
    free = best_plans(job("7b"), cluster)
    assert free[0].work.recompute == "none"
    bound = best_plans(job("7b", "activation_checkpointing=full"), cluster)
    assert {plan.work.recompute for plan in bound} == {"full"}
    assert bound[0].tokens_per_second < free[0].tokens_per_second
    # What a recipe says out loud holds, even where it is the default and does not fit.
    with pytest.raises(UserError, match=r"with no recomputation .* needs"):
        best_plans(job("72b", "activation_checkpointing=none"), Cluster(16, 80e9))


def test_the_long_context_stage_is_planned_with_the_shape_that_is_to_come() -> None:
    given = ("init=out/none/model", "out=out/long", "model.published=7b")
    asked = job("long_context", *given)
    (phase,) = asked.phases
    assert (phase.context, phase.step_rows, asked.tokens) == (32_768, 128, 100_000_595_968)
    assert asked.model.num_parameters() == PUBLISHED["7b"].num_parameters()
    best = best_plans(asked, Cluster(64, 80e9))[0]
    assert best.fits
    assert best.work.tokens * best.work.mesh.cp == 32_768 * best.work.rows


def test_the_phase_that_needs_most_decides_and_all_take_their_time() -> None:
    asked = job_of_phases("7b", *LONGER, model={"published": "7b"})
    cluster = Cluster(32, 80e9)
    best = best_plans(asked, cluster)[0]
    mesh, recompute = best.work.mesh, best.work.recompute
    assert (best.phase, best.work.context, best.step_tokens) == (1, 32_768, 1 << 22)
    first, second = (
        make_plan(replace(asked, phases=(phase,)), cluster, mesh, [work.rows], recompute)
        for phase, work in zip(asked.phases, best.works, strict=True)
    )
    assert first.memory.total <= best.memory.total == second.memory.total
    assert best.fits
    figures, seconds = best.figures(), 900 * first.time.total + 100 * second.time.total
    assert asked.tokens == 1000 << 22
    assert figures["tokens_per_second"] == pytest.approx(asked.tokens / seconds)
    assert figures["days"] == pytest.approx(seconds / 86_400)
    short, long = map(asked.model.flops_per_token, (4096, 32_768))
    assert figures["flops_per_token"] == pytest.approx(0.9 * short + 0.1 * long)
    assert figures["mfu"] * seconds * 32 * cluster.flops == pytest.approx(
        figures["flops_per_token"] * asked.tokens
    )


def test_a_later_phase_may_not_fit() -> None:
    """What the first alone would do is too much for the second."""
    first, cluster = LONGER[0], Cluster(8, 80e9)
    changes = {"mesh": {}, "model": {"published": "1.5b"}, "activation_checkpointing": "none"}
    assert own_plan(job_of_phases("1.5b", first, **changes), cluster).fits
    longer = own_plan(job_of_phases("1.5b", *LONGER, **changes), cluster)
    assert (longer.phase, longer.fits) == (1, False)


def test_one_phase_is_a_run_without_any() -> None:
    whole = best_plans(job("7b", "tokens=4194304000"), H100)
    assert [plan.figures() for plan in best_plans(job_of_phases("7b", {"steps": 1000}), H100)] == [
        plan.figures() for plan in whole
    ]


def test_every_phase_needs_the_mesh() -> None:
    odd = ({"steps": 9}, {"steps": 1, "context": 4094})
    with pytest.raises(UserError, match="context 4094 is no multiple of cp x tp = 4"):
        own_plan(job_of_phases("7b", *odd, mesh={"tp": 4}), H100)
    few = ({"steps": 9}, {"steps": 1, "accumulation": 1})
    with pytest.raises(UserError, match="4 x 1 rows, which 8 ranks cannot share evenly"):
        own_plan(job_of_phases("7b", *few, mesh={}), H100)
    assert {mesh.cp * mesh.tp for mesh in meshes(job_of_phases("7b", *odd), 8)} == {1, 2}
    assert {mesh.dp for mesh in meshes(job_of_phases("7b", *few), 8)} == {1, 2, 4}


def test_the_search_over_phases_finds_what_trying_everything_finds() -> None:
    changes = {"accumulation": 8, "model": {"published": "1.5b"}}
    phases = ({"steps": 3}, {"steps": 1, "context": 8192, "rows": 2})
    asked, cluster = job_of_phases("1.5b", *phases, **changes), Cluster(8, 40e9)
    best = []
    for mesh in meshes(asked, 8):
        rows = product(*(divisors(phase.step_rows // mesh.dp) for phase in asked.phases))
        plans = [
            make_plan(asked, cluster, mesh, each, recompute)
            for each in rows
            for recompute in RECOMPUTE
        ]
        if fitting := [plan for plan in plans if plan.fits]:
            best.append(min(fitting, key=merit))
    found = best_plans(asked, cluster)
    assert [plan.works for plan in found] == [plan.works for plan in sorted(best, key=merit)[:5]]


def test_processors_keep_more_free_than_devices_and_ranks_of_them_most() -> None:
    def headroom(device: str, ranks: int) -> float:
        asked = job("0.5b", f"device={device}", "mesh={}", "activation_checkpointing=full")
        plan = own_plan(asked, Cluster(ranks, 80e9))
        assert plan.fits
        # What leaves a byte less does not fit.
        least = plan.memory.total / (1 - plan.headroom)
        assert own_plan(asked, Cluster(ranks, least * 1.001)).fits
        assert not own_plan(asked, Cluster(ranks, least * 0.999)).fits
        return plan.headroom

    assert [headroom("cuda", 1), headroom("cuda", 2)] == [0.1, 0.1]
    assert [headroom("cpu", 1), headroom("cpu", 2)] == [0.2, 0.5]


def test_checkpoints_beside_training_need_memory_on_the_cpu_alone() -> None:
    def needed(*overrides: str) -> tuple[int, int]:
        plan = own_plan(job("0.5b", "mesh.dp_shard=2", *overrides), Cluster(2, 80e9))
        return plan.memory.checkpoint, plan.memory.total

    (none, plain), (some, more) = needed("device=cpu"), needed("device=cpu", "async_checkpoints=1")
    half = PUBLISHED["0.5b"].num_parameters() / 2
    assert none == 0
    assert some == more - plain == pytest.approx(12 * half + 4 * 151_936 * 896 / 2, rel=1e-3)
    assert needed("device=cuda", "async_checkpoints=1") == needed("device=cuda")


def test_all_meshes_are_found() -> None:
    # 4 devices, tied: pp 1; tp 1 or 2 (2 kv heads); cp 1 or 2, for tp 2 leaves 7 and 1 heads
    found = {describe(mesh) for mesh in meshes(job("0.5b"), 4)}
    assert found == {
        "dp_shard 4", "dp_replicate 2 x dp_shard 2", "dp_replicate 4", "dp_shard 2 x cp 2",
        "dp_replicate 2 x cp 2", "dp_shard 2 x tp 2", "dp_replicate 2 x tp 2",
    }  # fmt: skip
    assert divisors(12) == (1, 2, 3, 4, 6, 12)


@pytest.mark.parametrize(
    ("name", "devices", "gigabytes", "overrides"),
    [
        ("7b", 32, 80, []),
        ("7b", 24, 30, ["accumulation=6"]),
        ("57b-a14b", 64, 80, [*GIVEN, "accumulation=32"]),
        ("72b", 256, 80, ["accumulation=64"]),
        ("72b", 128, 30, ["accumulation=64"]),
    ],
)
def test_the_search_finds_what_trying_everything_finds(
    name: str, devices: int, gigabytes: int, overrides: list[str]
) -> None:
    asked, cluster = job(name, *overrides), Cluster(devices, gigabytes * 1e9)
    best = []
    for mesh in meshes(asked, devices):
        plans = [
            make_plan(asked, cluster, mesh, [rows], recompute)
            for rows in divisors(asked.phases[0].step_rows // mesh.dp)
            for recompute in RECOMPUTE
        ]
        fitting = [plan for plan in plans if plan.fits]
        if fitting:
            best.append(min(fitting, key=merit))
    found = best_plans(asked, cluster)
    assert [plan.work for plan in found] == [plan.work for plan in sorted(best, key=merit)[:5]]


@pytest.mark.parametrize(
    ("asked", "devices", "says"),
    [
        (("72b",), 8, "nothing fits 8 x 80 GB: the nearest mesh, tp 8 .* 32 devices or devices of"),
        (("0.5b",), 11, "no mesh of 11 devices divides the model and the 1024 rows"),
        (("7b", "mesh.tp=3"), 8, "tp 3 is 6 ranks, but the world has 8"),
        (("7b", "mesh.dp_shard=24"), 24, "4 x 256 rows, which 24 ranks cannot share evenly"),
        (("57b-a14b",), 8, "before it is there, give its shape beside it"),
        (("7b", "mesh.tq=3"), 8, "unknown key 'tq'"),
        (("long_context", "init=a/b/c", "out=b"), 8, "a/b/c: .*before it is there, give its shape"),
        (("7b", "stage=pretrian"), 8, "unknown stage 'pretrian'; did you mean 'pretrain'"),
    ],
)
def test_what_cannot_be_is_one_line(asked: Any, devices: int, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        best_plans(job(*asked), Cluster(devices, 80e9))
    assert "\n" not in str(error.value)
