"""`qwen2 corpus`: choose what to train on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen2.cli.options import Json

app = typer.Typer(help="From raw text to a mixture that was chosen.", no_args_is_help=True)
fetching = typer.Typer(help="Get text from elsewhere.", no_args_is_help=True)
app.add_typer(fetching, name="fetch")


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


@fetching.command()
def debian(
    out: Annotated[Path, typer.Option(help="Folder of the text; run it again to go on.")],
    manifest: Annotated[
        str, typer.Option(help="A YAML file, or the name of one shipped: packages and files.")
    ] = "debian_packages",
    as_json: Json = False,
) -> None:
    """Text of Debian's packages, by apt: nothing is installed, and no root is needed."""
    import json
    from dataclasses import asdict

    from qwen2.common.recipes import find_recipe
    from qwen2.corpus.debian import Manifest, fetch

    fetched, absent = fetch(Manifest.load(find_recipe(manifest)), out)
    if as_json:
        print(json.dumps({"packages": [asdict(one) for one in fetched], "absent": absent}))
        return
    files, size = sum(one.files for one in fetched), sum(one.bytes for one in fetched)
    print(f"{out}: {len(fetched)} packages, {files:,} files, {size / 1e6:.0f} MB")
    if absent:
        print(f"not in this release: {', '.join(absent)}")
