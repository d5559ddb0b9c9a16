"""`qwen2 corpus`: from raw text to a mixture that was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2.cli import corpus_quality, corpus_show
from qwen2.cli.options import Json

if TYPE_CHECKING:
    from qwen2.pipeline.corpus.why import Life

app = typer.Typer(help="From raw text to a mixture that was chosen.", no_args_is_help=True)
fetching = typer.Typer(help="Get text from elsewhere.", no_args_is_help=True)
app.add_typer(fetching, name="fetch")
app.add_typer(corpus_quality.app, name="quality")
app.command()(corpus_show.show)

Recipe = Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe shipped.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Replace its values.")
]
Folder = Annotated[Path, typer.Option(help="Folder of the run.")]


@app.command()
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Folder = Path("corpus"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one a core when not given.")
    ] = None,
    engine: Annotated[
        str,
        typer.Option(help="local, or ray: Ray's cluster (RAY_ADDRESS), with --out on all nodes."),
    ] = "local",
    as_json: Json = False,
) -> None:
    """Read, filter, deduplicate, decontaminate, tokenise; leave a report of every decision.

    Run it again to go on where it stopped. A recipe that was changed makes anew only what depends
    on the change, beside what is there.
    """
    import json

    from qwen2.common.cores import available_cores
    from qwen2.common.errors import UserError
    from qwen2.common.progress import say
    from qwen2.common.recipes import find_recipe
    from qwen2.pipeline.corpus import CorpusRecipe, run_corpus, terminal_summary
    from qwen2.pipeline.stages import Stopped
    from qwen2.pipeline.workers import open_workers

    if engine not in ("local", "ray"):
        raise UserError(f"--engine {engine}: choose local or ray")
    wanted = CorpusRecipe.load(find_recipe(recipe), overrides or [])
    try:
        with open_workers(workers or available_cores(), engine) as pool:  # type: ignore[arg-type]
            done = run_corpus(wanted, out, pool)
    except Stopped as stopped:
        say(str(stopped))
        return
    print(json.dumps(done.results) if as_json else terminal_summary(done))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of `qwen2 corpus run`.")],
    as_json: Json = False,
) -> None:
    """Count again what a finished run left, and write its summary.json and report.html anew."""
    import json

    from qwen2.pipeline.corpus import Layout
    from qwen2.pipeline.corpus.run import report as write
    from qwen2.pipeline.workers import open_workers

    layout = Layout.open(folder)
    with open_workers(1) as pool:
        figures = write(layout, pool)
    print(json.dumps(figures) if as_json else folder / "report.html")


@app.command()
def why(
    doc_id: Annotated[str, typer.Argument(metavar="DOC_ID", help="As in the report: source/...")],
    out: Folder = Path("corpus"),
    text: Annotated[bool, typer.Option("--text", help="Print its text too.")] = False,
    as_json: Json = False,
) -> None:
    """Tell the life of one document: where it is from, what was found, why it stayed or went."""
    import json
    from dataclasses import asdict

    from qwen2.pipeline.corpus import Layout
    from qwen2.pipeline.corpus.why import life_of

    life = life_of(Layout.open(out), doc_id)
    if as_json:
        print(json.dumps(asdict(life)))
    else:
        _print_life(life, text)


def _print_life(life: Life, text: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(life.document.id, "bold"))
    for stage, said in life.steps:
        console.print(Text(f"  {stage:<14}", "cyan") + Text(said))
    if text:
        console.print(Text(life.document.text))


@app.command()
def mixture(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Folder = Path("mixture"),
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
