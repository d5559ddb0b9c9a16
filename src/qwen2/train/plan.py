"""What a run would need and take on a cluster, before anything is started.

    Work (plan_memory.py)       the model, its mesh, the rows of a micro-batch
    Cluster (plan_time.py)      devices, their memory and speed, the links between them
    Plan                        bytes of a rank, traffic, seconds of a step, days of the run
    plan_search.py              the mesh that fits and is fastest

A step has as many tokens as the recipe says on one process, context x rows x accumulation, however
many ranks share them. FLOPs are those of rows of one document: shorter documents attend to less.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from qwen2.model.config import ModelConfig
from qwen2.train.asked import read_asked
from qwen2.train.mesh import Mesh
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

HEADROOM, CPU_HEADROOM = 0.1, 0.2
"""Share of a device's memory that is left to its runtime, libraries and what lies waste between
tensors: on the CPU glibc keeps up to a fifth more than there is (benchmarks/plan_memory.py)."""

DAY = 86_400  # seconds


@dataclass(frozen=True)
class Job:
    """What a recipe asks for, whoever does it."""

    model: ModelConfig
    context: int
    step_rows: int  # of all ranks in a step
    rows: int  # of a micro-batch, as the recipe has it
    tokens: int  # of the whole run
    dtype: Literal["bf16", "fp32"]
    optimizer: Literal["adamw", "muon"]
    on_cpu: bool
    mesh: Mesh | None  # as the recipe has it; None: it says nothing
    recompute: tuple[Recompute, ...]  # the recipe's way, or all of them where it names none

    @property
    def headroom(self) -> float:
        """Share of the memory that a plan leaves."""
        return CPU_HEADROOM if self.on_cpu else HEADROOM

    @property
    def step_tokens(self) -> int:
        """Tokens of an update."""
        return self.step_rows * self.context


@dataclass(frozen=True)
class Plan:
    """One way to do a job on a cluster."""

    job: Job
    work: Work
    cluster: Cluster
    stage: int  # of the pipeline, the one whose ranks need most
    memory: Memory  # of these, at the step's peak

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the headroom."""
        return self.memory.total <= self.cluster.memory * (1 - self.job.headroom)

    @property
    def time(self) -> StepTime:
        """Seconds of a step."""
        return step_time(self.work, self.cluster)

    @property
    def tokens_per_second(self) -> float:
        """Of all devices together."""
        return self.job.step_tokens / self.time.total

    def figures(self) -> dict[str, Any]:
        """All of it, as JSON has it: bytes, seconds, FLOPs."""
        work, cluster, time = self.work, self.cluster, self.time
        per_token = work.model.flops_per_token(work.context)
        speed = self.job.step_tokens / time.total
        return {
            "mesh": work.mesh.model_dump(),
            "rows": work.rows,
            "micro_batches": work.micro_batches,
            "recompute": work.recompute,
            "fits": self.fits,
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
            "days": self.job.tokens / speed / DAY,
        }


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
        recipe.context,
        asked.step_rows,
        recipe.rows,
        recipe.total_tokens,
        recipe.dtype,
        recipe.optimizer.kind,
        recipe.device == "cpu",
        asked.mesh,
        (recipe.activation_checkpointing,) if given else RECOMPUTE,
    )


def make_work(job: Job, mesh: Mesh, rows: int, recompute: Recompute) -> Work:
    """A step of a job on a resolved mesh, so many rows in a micro-batch."""
    assert job.step_rows % (mesh.dp * rows) == 0
    return Work(
        job.model,
        mesh,
        job.context,
        rows,
        job.step_rows // (mesh.dp * rows),
        job.dtype,
        recompute,
        job.optimizer,
        fused_norm=not job.on_cpu,
    )


def make_plan(job: Job, cluster: Cluster, mesh: Mesh, rows: int, recompute: Recompute) -> Plan:
    """The plan of that step: of the pipeline stage that needs most memory."""
    work = make_work(job, mesh, rows, recompute)
    peaks = {stage: peak(work, stage) for stage in stages_that_differ(work)}
    fullest = max(peaks, key=lambda stage: peaks[stage].total)
    return Plan(job, work, cluster, fullest, peaks[fullest])
