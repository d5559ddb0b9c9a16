"""The mesh for a job: all divisors of the devices are tried, the fastest that fits wins.

Every mesh that `Mesh.problems` lets pass, and whose ranks can share the rows of a step, is tried
with each number of rows in a micro-batch and each way to recompute activations: some thousands of
closed forms. Phases share mesh and way, and have rows of their own. Left out is what cannot win:
meshes that would be too slow even if everything fitted, those whose weights and optimizer do not
fit, and of more rows whatever did not fit with fewer.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig
from qwen2.train.mesh import ORDER, Mesh
from qwen2.train.plan import Job, Plan, make_plan, make_work, mean_of_steps
from qwen2.train.plan_memory import RECOMPUTE
from qwen2.train.plan_parameters import stage_shares
from qwen2.train.plan_time import Cluster, step_time

MOST = 1 << 20  # devices that are looked at when something would need more


def best_plans(job: Job, cluster: Cluster, count: int = 5) -> list[Plan]:
    """The fastest plans that fit, of different meshes; the first is that of the job's own mesh,
    where it has one that fits.

    Raises:
        UserError: no mesh divides the model and the rows of a step, or nothing fits; says what is
            nearest and what would help.
    """
    devices = cluster.devices
    own = own_plan(job, cluster) if job.mesh else None
    if own and own.fits:
        return [own]
    found: list[tuple[tuple[float, ...], Plan]] = []
    bounded = [(_least_seconds(job, cluster, m), i, m) for i, m in enumerate(meshes(job, devices))]
    for seconds, number, mesh in sorted(bounded, key=lambda entry: entry[:2]):
        if len(found) >= count and _three_digits(seconds) > found[count - 1][0][0]:
            break
        if plan := _fastest(job, cluster, mesh):
            insort(found, ((*merit(plan), number), plan), key=lambda entry: entry[0])
    if not found:
        raise UserError(_why_not(job, cluster))
    return [plan for _, plan in found[:count]]


def own_plan(job: Job, cluster: Cluster) -> Plan:
    """The job's own mesh, with its rows where they can be, and as little computed again as fits.

    Raises:
        UserError: the mesh cannot be, of one phase or another.
    """
    assert job.mesh
    rows = []
    for phase in job.phases:
        mesh = job.mesh.resolve(cluster.devices, job.model, phase.context)
        rows.append(phase.shared(mesh.dp, mesh.pp).rows)
    for recompute in job.recompute:
        plan = make_plan(job, cluster, mesh, rows, recompute)
        if plan.fits:
            break
    return plan


def meshes(job: Job, devices: int) -> Iterator[Mesh]:
    """All meshes of so many ranks that divide the model and the rows of a step."""
    for pp in divisors(devices):
        for tp in divisors(devices // pp):
            for cp in divisors(devices // pp // tp):
                dp = devices // pp // tp // cp
                if any(p.step_rows % dp or p.step_rows // dp < pp for p in job.phases):
                    continue
                for shard in divisors(dp):
                    for ep in _expert_ranks(job.model, shard * cp):
                        mesh = Mesh(
                            pp=pp, dp_replicate=dp // shard, dp_shard=shard, cp=cp, tp=tp, ep=ep
                        )
                        if not any(mesh.problems(job.model, p.context) for p in job.phases):
                            yield mesh


@lru_cache
def divisors(number: int) -> tuple[int, ...]:
    """From 1 up."""
    return tuple(d for d in range(1, number + 1) if number % d == 0)


def _expert_ranks(model: ModelConfig, ranks: int) -> tuple[int, ...]:
    return divisors(math.gcd(ranks, model.moe.num_experts)) if model.moe else (1,)


def _fastest(job: Job, cluster: Cluster, mesh: Mesh) -> Plan | None:
    """Of one mesh; None, where nothing fits.

    For each number of rows the one that computes least again, for it is the fastest.
    """
    if _state(job, mesh) > cluster.memory:
        return None
    if len(job.phases) > 1:
        return _fastest_of_phases(job, cluster, mesh)
    fitting, kinds = [], job.recompute
    own = job.phases[0].step_rows // mesh.dp
    for rows in divisors(own):
        if own // rows < mesh.pp:  # a micro-batch for each stage
            break
        for number, recompute in enumerate(kinds):
            plan = make_plan(job, cluster, mesh, [rows], recompute)
            if plan.fits:
                fitting.append(plan)
                kinds = kinds[number:]  # more rows need more
                break
        else:
            break
    return min(fitting, key=merit, default=None)


def _fastest_of_phases(job: Job, cluster: Cluster, mesh: Mesh) -> Plan | None:
    """The same of several phases, each of which is fastest with rows of its own."""
    fitting = []
    for recompute in job.recompute:
        jobs = [replace(job, phases=(phase,), recompute=(recompute,)) for phase in job.phases]
        alone = [plan for each in jobs if (plan := _fastest(each, cluster, mesh))]
        if len(alone) == len(jobs):
            rows = [plan.work.rows for plan in alone]
            fitting.append(make_plan(job, cluster, mesh, rows, recompute))
    return min(fitting, key=merit, default=None)


def _least_seconds(job: Job, cluster: Cluster, mesh: Mesh) -> float:
    """Of a step of a mesh, however many rows are in a micro-batch and whether they fit or not.

    What waits is least when all rows are in one micro-batch, and the bubble when each has its own.
    """
    least = []
    for phase in job.phases:
        rows = phase.step_rows // mesh.dp
        time = step_time(make_work(job, phase, mesh, rows, job.recompute[0]), cluster)
        exposed = time.compute + time.tp + time.cp + time.ep
        least.append(exposed + exposed * (mesh.pp - 1) / rows)
    return mean_of_steps(job, least)


def _state(job: Job, mesh: Mesh) -> int:
    """Bytes of weights and one moment in the first stage: every plan of a mesh needs more."""
    return 8 * stage_shares(job.model, mesh, 0).kept


def merit(plan: Plan) -> tuple[float, ...]:
    """Less is better: time to three digits, then what is computed again, then dimensions in use,
    then memory."""
    mesh = plan.work.mesh
    used = sum(getattr(mesh, name) > 1 for name in (*ORDER, "ep"))
    return (
        _three_digits(plan.mean_seconds),
        RECOMPUTE.index(plan.work.recompute),
        used,
        plan.memory.total,
    )


def _three_digits(seconds: float) -> float:
    return float(f"{seconds:.3g}")


def _why_not(job: Job, cluster: Cluster) -> str:
    """One line: what is nearest, and what would help."""
    nearest = _nearest(job, cluster)
    if nearest is None:
        rows = " or ".join(str(n) for n in sorted({phase.step_rows for phase in job.phases}))
        return (
            f"no mesh of {cluster.devices} devices divides the model and the {rows} rows "
            "of a step (rows x accumulation); choose a number of devices with more factors of two"
        )
    amount = {"none": "no"}.get(nearest.work.recompute, nearest.work.recompute)
    need = nearest.memory.total / (1 - nearest.headroom)
    helps = [f"devices of {need / 1e9:,.0f} GB"]
    more = cluster.devices * 2
    while more <= MOST:
        found = _nearest(job, replace(cluster, devices=more))
        if found is None:
            break
        if found.fits:
            helps.insert(0, f"{more} devices")
            break
        more *= 2
    return (
        f"nothing fits {cluster.devices} x {cluster.memory / 1e9:,.0f} GB: the nearest mesh, "
        f"{describe(nearest.work.mesh)} with {amount} recomputation and one row a "
        "micro-batch, needs "
        f"{nearest.memory.total / 1e9:,.1f} GB and {nearest.headroom:.0%} to spare; "
        f"{' or '.join(helps)} would do"
    )


def _nearest(job: Job, cluster: Cluster) -> Plan | None:
    """The plan that needs least memory, or nearly; None, where no mesh can be."""
    best = None
    for mesh in meshes(job, cluster.devices):
        if best is None or _state(job, mesh) < best.memory.total:
            plan = make_plan(job, cluster, mesh, [1] * len(job.phases), job.recompute[-1])
            best = plan if best is None else min(best, plan, key=lambda p: p.memory.total)
    return best


def describe(mesh: Mesh) -> str:
    """The dimensions in use, such as `pp 2 x dp_shard 16 x tp 8`."""
    sizes = {**mesh.sizes(), "ep": mesh.ep}
    used = [f"{name} {size}" for name, size in sizes.items() if size > 1 and name != "ep"]
    text = " x ".join(used) or "one rank"
    return f"{text}, ep {mesh.ep}" if mesh.ep > 1 else text
