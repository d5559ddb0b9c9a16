"""`qwen2 corpus`: choose what to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen2.cli import corpus_quality
from qwen2.cli.options import Json

app = typer.Typer(help="From raw text to a mixture that was chosen.", no_args_is_help=True)
app.add_typer(corpus_quality.app, name="quality")


@app.command()
def mixture(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe shipped.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Replace its values.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("mixture"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Proxies at a time; one a core when not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose weights over kinds of text, or compare two quality thresholds, by small proxy models.

    Run it again to go on where it stopped.
    """
    import json

    from qwen2.common.cores import available_cores
    from qwen2.common.progress import say
    from qwen2.common.recipes import find_recipe
    from qwen2.pipeline.mixture import run_experiment
    from qwen2.pipeline.stages import Stopped

    try:
        results, summary = run_experiment(
            find_recipe(recipe), overrides or [], out, workers or available_cores()
        )
    except Stopped as stopped:
        say(str(stopped))
        return
    print(json.dumps(results) if as_json else summary)
