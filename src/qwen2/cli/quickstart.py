"""`qwen2 quickstart`: the whole system in a few minutes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen2.cli.options import Json


def quickstart(
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("quickstart"),
    minutes: Annotated[
        float | None, typer.Option(min=0.5, help="Time for the whole; 8 when not given.")
    ] = None,
    as_json: Json = False,
) -> None:
    """The report in miniature on real text: data, tokenizer, training, evaluation, a report.

    Run it again to go on where it stopped.
    """
    import json

    from qwen2.common.progress import say
    from qwen2.common.recipes import find_recipe
    from qwen2.common.runtime import available_cores, set_threads
    from qwen2.pipeline.quickstart import STAGES, QuickstartRecipe, terminal_summary
    from qwen2.pipeline.stages import Stopped, run_stages

    set_threads(available_cores())
    overrides = [] if minutes is None else [f"minutes={minutes}"]
    recipe = QuickstartRecipe.load(find_recipe("quickstart"), overrides)
    try:
        run = run_stages(STAGES, out, recipe)
    except Stopped as stopped:
        say(str(stopped))
        return
    if as_json:
        print(json.dumps(run.results))
    else:
        print(terminal_summary(run))
