"""`qwen2 corpus quality`: train what scores the quality of documents."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from qwen2.cli.options import Json, Threads

app = typer.Typer(help="Scorers of quality.", no_args_is_help=True)


@app.callback()
def quality() -> None:
    """Scorers of quality."""


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: labels, and what to train.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[key.sub=value]...", help="Replace its values.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("quality"),
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a linear classifier and a model's head on labelled texts, and calibrate them.

    Run it again to go on where it stopped.
    """
    import json

    from qwen2.common.runtime import set_threads
    from qwen2.pipeline.quality import QualityRecipe, train_quality

    set_threads(threads)
    results = train_quality(QualityRecipe.load(recipe, overrides or []), out)
    print(json.dumps(results) if as_json else _summary(results, out))


def _summary(results: dict[str, dict[str, Any]], out: Path) -> str:
    """A line for each language and scorer, and where the page is."""
    agreed = results["report"]["agreement"]
    lines = ["", f"{'language':12}{'good':>7}{'bad':>7}" + "".join(f"{n:>16}" for n in agreed)]
    for language, one in next(iter(agreed.values())).items():
        cells = []
        for figures in agreed.values():
            auc, right = figures[language]["auc"], figures[language].get("accuracy")
            cells.append(
                ("-" if auc is None else f"{auc:.3f}") + ("" if right is None else f" {right:4.0%}")
            )
        lines.append(
            f"{language:12}{one['good']:7}{one['bad']:7}" + "".join(f"{c:>16}" for c in cells)
        )
    lines.append("AUC on held-out labels, and how many are right at 0.5.")
    return "\n".join([*lines, f"{out / 'quality.html'}"])
