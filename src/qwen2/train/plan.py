"""What a run would need and take on a cluster, before anything is started.

    Work (plan_memory.py)       the model, its mesh, the rows of a micro-batch
    Cluster (plan_time.py)      devices, their memory and speed, the links between them
    Plan                        bytes of a rank, traffic, seconds of a step, days of the run
    plan_search.py              the mesh that fits and is fastest

A step has as many tokens as the recipe says on one process, context x rows x accumulation, however
many ranks share them. FLOPs are those of rows of one document: shorter documents attend to less.

A run of several phases (phases.py) has a Work for each. It fits if the one does that needs most
memory, of which bytes, traffic and the seconds of a step are told; tokens/s, MFU and days are of
all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qwen2.model.config import ModelConfig
from qwen2.train.asked import read_asked
from qwen2.train.mesh import Mesh
from qwen2.train.phases import Stretch
from qwen2.train.plan_memory import (
    RECOMPUTE,
    Memory,
    Work,
    activations,
    loss_block,
    peak,
    stages_that_differ,
)
from qwen2.train.plan_time import Cluster, StepTime, bubble_share, step_time, traffic
from qwen2.train.recompute import Recompute

HEADROOM, CPU_HEADROOM, CPU_RANKS_HEADROOM = 0.1, 0.2, 0.5
"""Share of a device's memory that is left to its runtime, libraries and what lies waste between
tensors: on the CPU glibc keeps up to a fifth more than there is, and up to as much again on each of
several ranks, whose weights and gradients come and go in large blocks between small ones that stay
(benchmarks/plan_memory.py)."""

DAY = 86_400  # seconds


@dataclass(frozen=True)
class Job:
    """What a recipe asks for, whoever does it."""

    model: ModelConfig
    phases: tuple[Stretch, ...]  # as on one process; most runs have one
    dtype: Literal["bf16", "fp32"]
    optimizer: Literal["adamw", "muon"]
    on_cpu: bool
    async_checkpoints: bool
    mesh: Mesh | None  # as the recipe has it; None: it says nothing
    recompute: tuple[Recompute, ...]  # the recipe's way, or all of them where it names none

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        return sum(phase.steps for phase in self.phases)

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return sum(phase.steps * phase.step_tokens for phase in self.phases)


@dataclass(frozen=True)
class Plan:
    """One way to do a job on a cluster."""

    job: Job
    works: tuple[Work, ...]  # of each phase
    cluster: Cluster
    phase: int  # the one that needs most, counted from 0
    stage: int  # of the pipeline, the one whose ranks need most in it
    memory: Memory  # of these, at the step's peak

    @property
    def work(self) -> Work:
        """A step of the phase that needs most."""
        return self.works[self.phase]

    @property
    def step_tokens(self) -> int:
        """Tokens of an update of that phase."""
        return self.job.phases[self.phase].step_tokens

    @property
    def headroom(self) -> float:
        """Share of a device's memory that must stay free."""
        if not self.job.on_cpu:
            return HEADROOM
        return CPU_HEADROOM if self.work.mesh.world_size == 1 else CPU_RANKS_HEADROOM

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the headroom."""
        return self.memory.total <= self.cluster.memory * (1 - self.headroom)

    @property
    def time(self) -> StepTime:
        """Seconds of a step of that phase."""
        return step_time(self.work, self.cluster)

    @property
    def mean_seconds(self) -> float:
        """Of a step of the run, all phases together."""
        return mean_of_steps(self.job, [step_time(w, self.cluster).total for w in self.works])

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together, over the whole run."""
        return self.job.tokens / self.job.steps / self.mean_seconds

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON has it: bytes, seconds, FLOPs."""
        work, cluster, time, job = self.work, self.cluster, self.time, self.job
        flops = [p.step_tokens * job.model.flops_per_token(p.context) for p in job.phases]
        per_token = mean_of_steps(job, flops) * job.steps / job.tokens
        speed = self.tokens_per_second
        return {
            "mesh": work.mesh.model_dump(),
            "rows": work.rows,
            "micro_batches": work.micro_batches,
            "recompute": work.recompute,
            "fits": self.fits,
            "phase": self.phase,
            "stage": self.stage,
            "memory": {**asdict(self.memory), "total": self.memory.total},
            "activations": {kind: activations(work, self.stage, kind) for kind in RECOMPUTE},
            "logits_block": loss_block(work)[0],
            "flops_per_token": per_token,
            "traffic": asdict(traffic(work, self.stage)),
            "bubble_share": bubble_share(work),
            "step_seconds": asdict(time),
            "tokens_per_second": speed,
            "mfu": speed * per_token / (cluster.devices * cluster.flops),
            "days": job.tokens / speed / DAY,
        }


def mean_of_steps(job: Job, amounts: Sequence[float]) -> float:
    """Of a step of a job, from those of a step of each phase."""
    pairs = zip(job.phases, amounts, strict=True)
    return sum(phase.steps * amount for phase, amount in pairs) / job.steps


def read_job(values: dict[str, Any], where: str) -> Job:
    """The job of a recipe's values; `where` names it.

    Raises:
        UserError: see `read_asked`.
    """
    asked = read_asked(values, where)
    recipe = asked.recipe
    given = "activation_checkpointing" in recipe.model_fields_set
    return Job(
        asked.model,
        tuple(recipe.plan),
        recipe.dtype,
        recipe.optimizer.kind,
        recipe.device == "cpu",
        recipe.async_checkpoints,
        asked.mesh,
        (recipe.activation_checkpointing,) if given else RECOMPUTE,
    )


def make_work(job: Job, phase: Stretch, mesh: Mesh, rows: int, recompute: Recompute) -> Work:
    """A step of a phase of a job on a resolved mesh, so many rows in a micro-batch."""
    assert phase.step_rows % (mesh.dp * rows) == 0
    return Work(
        job.model,
        mesh,
        phase.context,
        rows,
        phase.step_rows // (mesh.dp * rows),
        job.dtype,
        recompute,
        job.optimizer,
        job.on_cpu,
        job.async_checkpoints,
    )


def make_plan(
    job: Job, cluster: Cluster, mesh: Mesh, rows: Sequence[int], recompute: Recompute
) -> Plan:
    """The plan of that mesh; `rows` of a micro-batch in each phase."""
    pairs = zip(job.phases, rows, strict=True)
    works = tuple(make_work(job, phase, mesh, each, recompute) for phase, each in pairs)
    peaks = {
        (phase, stage): peak(work, stage)
        for phase, work in enumerate(works)
        for stage in stages_that_differ(work)
    }
    fullest = max(peaks, key=lambda place: peaks[place].total)
    return Plan(job, works, cluster, *fullest, peaks[fullest])
