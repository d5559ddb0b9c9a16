"""`qwen2 train`: run a training recipe, or look at what one would keep on many ranks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2.cli.options import Json

if TYPE_CHECKING:
    from qwen2.train.dry_run import DryRun


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe shipped.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Replace its values.")
    ] = None,
    only_look: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Train nothing: divide the model among ranks that are not there, and say what one "
            "keeps.",
        ),
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Ranks of the dry run; default: 1.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train as RECIPE says; the same command again resumes where it stopped."""
    from qwen2.common.errors import UserError
    from qwen2.common.recipes import find_recipe

    path = find_recipe(recipe)
    if only_look:
        _look(path, overrides or [], world_size or 1, as_json)
    elif world_size is not None:
        raise UserError(
            f"--world-size {world_size} is of --dry-run; a run has as many ranks as torchrun starts"
        )
    else:
        _run(path, overrides or [], as_json)


def _run(path: Path, overrides: list[str], as_json: bool) -> None:
    import dataclasses
    import json

    from qwen2.pipeline.train import run_recipe
    from qwen2.train.world import is_first_process

    result = run_recipe(path, overrides)
    if not is_first_process():
        return
    if as_json:
        print(json.dumps(dataclasses.asdict(result), default=str))
    elif result.finished:
        print(f"step {result.step} of {result.steps}, {result.tokens:,} tokens: {result.model}")
        if positions := getattr(result, "positions", None):  # of the long-context stage
            print(f"perplexity by position: {positions} and {positions.with_suffix('.svg').name}")
    else:
        print(f"stopped at step {result.step} of {result.steps}: {result.checkpoint}")


def _look(path: Path, overrides: list[str], world_size: int, as_json: bool) -> None:
    import json

    from qwen2.common.config import read_values
    from qwen2.train.asked import read_asked
    from qwen2.train.dry_run import dry_run

    found = dry_run(read_asked(read_values(path, overrides), str(path)), world_size)
    if as_json:
        print(json.dumps(found.figures()))
    else:
        _show(path.stem, found)


def _show(name: str, found: DryRun) -> None:
    from rich.console import Console
    from rich.table import Table

    from qwen2.train.plan_search import describe

    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{name}: {found.model.num_parameters() / 1e9:,.2f}B parameters on "
        f"{found.mesh.world_size} ranks\nmesh: {describe(found.mesh)}\n\n"
        "kept by the fullest rank, in GB (activations: qwen2 plan)"
    )
    table = Table(box=None)
    for title in ("stage", "M parameters", "weights", "gradients", "optimizer", "total"):
        table.add_column(title, justify="right")
    for each in found.holdings:
        sizes = (each.weights, each.gradients, each.optimizer, each.total)
        gigabytes = [f"{size / 1e9:,.3f}" for size in sizes]
        table.add_row(str(each.stage), f"{each.parameters / 1e6:,.1f}", *gigabytes)
    console.print(table)
    if gathered := found.holdings[0].gathered:
        units = ", ".join(f"{kind} {size / 1e9:,.3f}" for kind, size in gathered.items())
        console.print(f"\ngathered by FSDP while in use, the largest of each: {units}")
