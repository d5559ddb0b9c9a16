"""`qwen2 synth`: text that a model writes for training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen2.cli.options import Json

app = typer.Typer(help="Text that a model writes for training.", no_args_is_help=True)


@app.callback()
def synth() -> None:
    """Text that a model writes for training."""


@app.command()
def text(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a recipe shipped.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Replace its values.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("synthesis"),
    endpoint: Annotated[
        str | None,
        typer.Option(help="URL of an OpenAI-compatible server, which answers instead of us."),
    ] = None,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again for what had no answer.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make text for pre-training of documents: rewritten, questions, sections of textbooks.

    Run it again to go on where it stopped.
    """
    import dataclasses
    import json

    from qwen2.common.progress import say
    from qwen2.common.recipes import find_recipe
    from qwen2.synthesis import SynthesisRecipe, synthesize

    given = [*(overrides or []), *([f"endpoint.url={json.dumps(endpoint)}"] if endpoint else [])]
    settings = SynthesisRecipe.load(find_recipe(recipe), given)
    outcome = synthesize(settings, out, retry_failed=retry_failed)
    if as_json:
        print(json.dumps(dataclasses.asdict(outcome)))
        return
    if not outcome.finished or outcome.summary is None:
        say(f"stopped with {outcome.answered:,} of {outcome.records:,} answers; run it again")
        return
    for name, tally in outcome.summary["tasks"].items():
        rejected = sum(tally["rejected"].values())
        print(
            f"{name}: {tally['kept']:,} of {tally['records']:,} kept, {rejected:,} rejected, "
            f"{tally['failed']:,} without an answer; {tally['bytes'] / 1e6:.2f} MB"
        )
    if outcome.speed:
        print(
            f"{outcome.speed['records_per_s']:.2f} records/s, "
            f"{outcome.speed['tokens_per_s']:.0f} tokens/s"
        )
    print(f"{out / 'documents'}: a source for the corpus; look at {out / 'samples.html'}")
