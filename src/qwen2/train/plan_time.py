"""How long a training step takes on a cluster, in closed form: products, collectives, bubble.

Compute is the model's FLOPs (`ModelConfig.flops_per_token`) at a share of the devices' peak. A
collective over s ranks moves (s - 1)/s of what it gathers, scatters or exchanges through each rank,
twice that for an all-reduce (Thakur et al. 2005); latencies are left out. A group with several
members in a host has their network cards together. What is taken for granted of overlap:

    hidden    FSDP's and HSDP's collectives behind compute: a step takes the longer of the two
    exposed   those of tp, cp and ep, and the pipeline's sends: they wait for each other
    bubble    1F1B's: of M micro-batches in p stages, M + p - 1 times the slowest stage's
    left out  the optimizer, the loader, stragglers, checkpoints
"""

from __future__ import annotations

from dataclasses import dataclass

from qwen2.train.plan_memory import Work, stages_that_differ
from qwen2.train.plan_parameters import stage_layers, stage_shares


@dataclass(frozen=True)
class Cluster:
    """Devices, all alike, in hosts. The defaults are of NVIDIA H100 SXM."""

    devices: int
    memory: float  # bytes of a device
    flops: float = 989e12  # FLOP/s of a device's peak, bf16 without sparsity
    host_bandwidth: float = 450e9  # bytes/s each way between devices of a host: NVLink 4
    bandwidth: float = 50e9  # bytes/s each way of a device to other hosts: 400 Gbit/s
    host: int = 8  # devices of a host
    efficiency: float = 0.5
    """Share of the peak that a device computes at while it waits for no other. Llama 3 (Grattafiori
    et al. 2024, table 4) reaches 0.38 to 0.43 with all that it waits for."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends in a step."""

    fsdp: float  # all-gathers of weights, twice a micro-batch, and reduce-scatters of gradients
    hsdp: float  # all-reduce of the gradients between replicas, once a step
    tp: float  # all-gathers and reduce-scatters of a layer's tokens, all-reduces of gradients
    cp: float  # all-to-alls of heads
    ep: float  # all-to-alls of tokens
    pp: float  # activations to the next stage, gradients to the one before


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step; `total` is not their sum, as some run beside others."""

    compute: float
    fsdp: float
    hsdp: float
    tp: float
    cp: float
    ep: float
    pp: float
    bubble: float
    total: float


def stage_flops(work: Work, stage: int) -> float:
    """FLOPs of a step in one stage, of all its ranks that share a row, with those done again."""
    model, mesh = work.model, work.mesh
    head = 6 * model.vocab_size * model.hidden_size
    body = model.flops_per_token(work.context) - head
    again = 0.0  # of the forward pass, which is a third of all
    if work.recompute == "full":
        again = body / 3
    elif work.recompute == "selective" and (moe := model.moe):  # the routed experts' products
        routed = 3 * model.hidden_size * moe.moe_intermediate_size * moe.num_experts_per_tok
        again = 2 * model.num_hidden_layers * routed
    share = stage_layers(model.num_hidden_layers, mesh.pp)[stage] / model.num_hidden_layers
    each = (body + again) * share + (head if stage == mesh.pp - 1 else 0)
    return each * work.rows * work.context * work.micro_batches


def traffic(work: Work, stage: int = 0) -> Traffic:
    """What a rank of `stage` sends in a step."""
    model, mesh, b, n = work.model, work.mesh, work.itemsize, work.tokens
    M, C, tp, cp = work.micro_batches, model.hidden_size, mesh.tp, mesh.cp
    layers = stage_layers(model.num_hidden_layers, mesh.pp)[stage]
    first, last = stage == 0, stage == mesh.pp - 1
    passes = 3 if work.recompute == "full" else 2  # over a layer: forward, again, backward
    own = stage_shares(model, mesh, stage)
    gathered = own.dense * _ring(mesh.fsdp) + own.experts * _ring(mesh.fsdp * tp // mesh.ep)
    replicas, moe = mesh.dp_replicate, model.moe
    keys = model.head_dim * max(model.num_key_value_heads, tp * cp)
    exchanged = (2 * C + 2 * keys) / tp  # q and the output, k and v
    rows = 2 * n / tp * moe.num_experts_per_tok * C * b if moe else 0  # sent and returned
    gathers = 2 if moe else 4  # and scatters, of a layer: a mixture needs none
    ends = 2 * (first + last)  # of the embedding and the head, forward and backward
    return Traffic(
        # Weights in the compute dtype before each of the two passes, gradients in fp32.
        fsdp=M * (2 * b + 4) * gathered if mesh.fsdp > 1 else 0,
        hsdp=2 * _ring(replicas) * 4 * own.kept,
        # Gradients of what all ranks have alike are summed over them.
        tp=M * ((gathers * passes * layers + ends) * n * C + 2 * own.whole) * b * _ring(tp),
        cp=M * passes * layers * n * exchanged * b * _ring(cp),
        ep=M * passes * layers * rows * _ring(mesh.ep),
        pp=M * n * C * b / tp * ((not first) + (not last)),
    )


def step_time(work: Work, cluster: Cluster) -> StepTime:
    """Seconds of a step: of the slowest stage, with the bubble."""
    return max(
        (_stage_time(work, cluster, s) for s in stages_that_differ(work)), key=lambda t: t.total
    )


def _stage_time(work: Work, cluster: Cluster, stage: int) -> StepTime:
    mesh, sent = work.mesh, traffic(work, stage)
    ranks = mesh.cp * mesh.tp  # that share a stage's part of a row
    compute = stage_flops(work, stage) / ranks / (cluster.flops * cluster.efficiency)
    copies = mesh.fsdp * mesh.tp  # ranks from one replica to the next
    fsdp = sent.fsdp / ring_bandwidth(cluster, mesh.fsdp, mesh.tp)
    hsdp = sent.hsdp / ring_bandwidth(cluster, mesh.dp_replicate, copies)
    tp = sent.tp / ring_bandwidth(cluster, mesh.tp, 1)
    cp = sent.cp / exchange_bandwidth(cluster, mesh.cp, mesh.tp)
    ep = sent.ep / exchange_bandwidth(cluster, mesh.ep, 1)
    pp = sent.pp / exchange_bandwidth(cluster, mesh.pp, copies * mesh.dp_replicate)
    exposed = compute + tp + cp + ep
    bubble = exposed * (mesh.pp - 1) / work.micro_batches
    total = max(exposed + bubble, fsdp + hsdp) + pp
    return StepTime(compute, fsdp, hsdp, tp, cp, ep, pp, bubble, total)


def bubble_share(work: Work) -> float:
    """(p - 1) / (M + p - 1), the share of its time that a stage of the pipeline waits."""
    return (work.mesh.pp - 1) / (work.micro_batches + work.mesh.pp - 1)


def ring_bandwidth(cluster: Cluster, size: int, stride: int) -> float:
    """Bytes/s of each of `size` ranks, `stride` apart, in a ring through all of them.

    At the border of a host the ring has the network cards of all its members there.
    """
    here = _members(cluster, size, stride)
    if here >= size:
        return cluster.host_bandwidth
    return min(cluster.host_bandwidth, here * cluster.bandwidth)


def exchange_bandwidth(cluster: Cluster, size: int, stride: int) -> float:
    """Bytes/s of each of `size` ranks, `stride` apart, that send each other as much.

    What leaves the host goes through a rank's own network card, beside what stays.
    """
    here = _members(cluster, size, stride)
    if here >= size:
        return cluster.host_bandwidth
    return min(cluster.host_bandwidth, cluster.bandwidth * (size - 1) / (size - here))


def _members(cluster: Cluster, size: int, stride: int) -> int:
    """How many of a group's ranks one host has."""
    return min(size, max(1, cluster.host // stride))


def _ring(size: int) -> float:
    return (size - 1) / size
