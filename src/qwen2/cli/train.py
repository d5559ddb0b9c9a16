"""`qwen2 train`: run a training recipe."""

from __future__ import annotations

from typing import Annotated

import typer

from qwen2.cli.options import Json


def train(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe shipped.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Replace its values.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train as RECIPE says; the same command again resumes where it stopped."""
    import dataclasses
    import json

    from qwen2.common.recipes import find_recipe
    from qwen2.pipeline.train import run_recipe
    from qwen2.train.world import find_place

    result = run_recipe(find_recipe(recipe), overrides or [])
    if (place := find_place()) and place.rank:
        return  # the first one speaks for all
    if as_json:
        print(json.dumps(dataclasses.asdict(result), default=str))
    elif result.finished:
        print(f"step {result.step} of {result.steps}, {result.tokens:,} tokens: {result.model}")
        if positions := getattr(result, "positions", None):  # of the long-context stage
            print(f"perplexity by position: {positions} and {positions.with_suffix('.svg').name}")
    else:
        print(f"stopped at step {result.step} of {result.steps}: {result.checkpoint}")
