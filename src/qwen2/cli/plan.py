"""`qwen2 plan`: what a run needs and takes on a cluster, before it is started."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen2.cli.options import Json

if TYPE_CHECKING:
    from qwen2.train.plan import Plan

SHOWN = 5  # meshes


def plan(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe shipped.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Replace its values.")
    ] = None,
    devices: Annotated[int, typer.Option(min=1, help="How many there are.")] = 1,
    memory: Annotated[float, typer.Option(min=0.001, help="GB (1e9 bytes) of a device.")] = 80,
    flops: Annotated[
        float,
        typer.Option(min=1, help="Peak FLOP/s of a device; default: an H100 SXM's in bf16."),
    ] = 989e12,
    bandwidth: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="GB/s each way of a device to other hosts; default: 400 Gbit/s InfiniBand.",
        ),
    ] = 50,
    host_bandwidth: Annotated[
        float,
        typer.Option(
            min=0.001,
            help="GB/s each way between devices of a host; default: an H100's NVLink, whose 900 "
            "GB/s are of both ways.",
        ),
    ] = 450,
    host: Annotated[int, typer.Option(min=1, help="Devices of a host.")] = 8,
    efficiency: Annotated[
        float,
        typer.Option(
            min=0.01, max=1, help="Share of the peak that a device computes at between collectives."
        ),
    ] = 0.5,
    as_json: Json = False,
) -> None:
    """Say what RECIPE needs on so many devices: memory, traffic, time, and the mesh to take.

    A recipe with a mesh that fits is planned as it is; otherwise the fastest mesh is searched.
    """
    import json

    from qwen2.common.config import read_values
    from qwen2.common.progress import say
    from qwen2.common.recipes import find_recipe
    from qwen2.train.plan import read_job
    from qwen2.train.plan_search import best_plans, own_plan
    from qwen2.train.plan_time import Cluster

    path = find_recipe(recipe)
    job = read_job(read_values(path, overrides or []), str(path))
    cluster = Cluster(
        devices, memory * 1e9, flops, host_bandwidth * 1e9, bandwidth * 1e9, host, efficiency
    )
    if job.mesh and not (own := own_plan(job, cluster)).fits:
        say(
            f"the recipe's mesh needs {own.memory.total / 1e9:,.1f} GB of {memory:g}; "
            "here are others"
        )
    plans = best_plans(job, cluster, SHOWN)
    if as_json:
        found = {
            "parameters": job.model.num_parameters(),
            "step_tokens": plans[0].step_tokens,
            "tokens": job.tokens,
            "cluster": vars(cluster),
            "headroom": plans[0].headroom,
            "plan": plans[0].figures(),
            "others": [other.figures() for other in plans[1:]],
        }
        print(json.dumps(found))
    else:
        _show(path.stem, plans)


def _show(name: str, plans: list[Plan]) -> None:
    from rich.console import Console

    from qwen2.train.plan_search import describe

    best, console = plans[0], Console(highlight=False, soft_wrap=True)
    job, cluster, work, figures = best.job, best.cluster, best.work, best.figures()
    say = console.print
    phase = ""
    if len(job.phases) > 1:
        phase = (
            f"phase {best.phase + 1} of {len(job.phases)} needs most memory: what is said of a "
            "step is of its steps; tokens/s, MFU and days are of all phases\n"
        )
    say(
        f"{name}: {job.model.num_parameters() / 1e9:,.2f}B parameters, {best.step_tokens:,} tokens "
        f"a step, {job.tokens:,} in all\n"
        f"{cluster.devices} x {cluster.memory / 1e9:g} GB, "
        f"{cluster.flops / 1e12:g} TFLOP/s, {cluster.host_bandwidth / 1e9:g} GB/s in hosts of "
        f"{cluster.host}, {cluster.bandwidth / 1e9:g} GB/s between\n\n"
        f"mesh: {describe(work.mesh)}; recompute {work.recompute}\n{phase}"
        f"micro-batches: {work.micro_batches} a step, rows of {work.context:,} tokens: {work.rows}"
    )
    stage = f" (stage {best.stage}, the fullest)" if work.mesh.pp > 1 else ""
    say(f"\nof a rank at its peak{stage}         GB")
    for part, size in figures["memory"].items():
        if size:
            say(f"  {part:18} {size / 1e9:13,.2f}")
    kinds = ", ".join(f"{kind} {size / 1e9:,.2f}" for kind, size in figures["activations"].items())
    block = figures["logits_block"] / 1e9
    say(f"  activations by recompute: {kinds}; block of logits: {block:.2f}")
    say("\na step, of a rank          GB sent   seconds")
    for part, seconds in figures["step_seconds"].items():
        sent = figures["traffic"].get(part)
        if seconds:
            say(f"  {part:18} {'' if sent is None else f'{sent / 1e9:,.2f}':>13} {seconds:9,.3f}")
    say(
        f"\n{figures['tokens_per_second']:,.0f} tokens/s, MFU {figures['mfu']:.1%}, "
        f"{figures['days']:,.1f} days, {figures['flops_per_token'] / 1e9:,.2f} GFLOP a token\n"
        f"devices compute at {cluster.efficiency:.0%} of their peak; the collectives of FSDP and "
        "HSDP are hidden behind that, the others are not"
    )
    if len(plans) > 1:
        say("\nthe fastest that fit")
        console.print(_table(plans))


def _table(plans: list[Plan]) -> Any:
    from rich.table import Table

    from qwen2.train.plan_search import describe

    table = Table(box=None)
    for title in ("mesh", "rows", "recompute", "GB", "tokens/s", "MFU", "days"):
        table.add_column(title, justify="left" if title in ("mesh", "recompute") else "right")
    for plan in plans:
        figures = plan.figures()
        table.add_row(
            describe(plan.work.mesh),
            str(plan.work.rows),
            plan.work.recompute,
            f"{plan.memory.total / 1e9:.1f}",
            f"{figures['tokens_per_second']:,.0f}",
            f"{figures['mfu']:.1%}",
            f"{figures['days']:,.1f}",
        )
    return table
