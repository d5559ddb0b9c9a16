"""`qwen2`: gathers the commands, and turns errors into one line and exit code 2."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

import qwen2
from qwen2.cli import (
    bench,
    chat,
    convert,
    corpus,
    doctor,
    generate,
    plan,
    quickstart,
    score,
    serve,
    synth,
    tokenizer,
    train,
    upcycle,
)
from qwen2.common.errors import UserError

INTERRUPTED = 130  # the exit code that typer makes of Ctrl-C

app = typer.Typer(
    help="The whole system of the Qwen2 Technical Report: data, training, evaluation, inference.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"qwen2 {qwen2.__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


app.command()(quickstart.quickstart)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(score.score)
app.command()(convert.convert)
app.add_typer(tokenizer.app, name="tokenizer")
app.add_typer(corpus.app, name="corpus")
app.add_typer(synth.app, name="synth")
app.command()(train.train)
app.command()(plan.plan)
app.command()(upcycle.upcycle)
app.command()(doctor.doctor)
app.add_typer(bench.app, name="bench")


def main() -> None:
    """Entry point: exit 0 when done, 2 for what the user can mend, 130 for Ctrl-C."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2, error)
    except Exception as error:
        # What the parser of the command line says of a wrong option; empty when it printed help.
        if not hasattr(error, "format_message"):
            raise
        if not (message := error.format_message()):
            sys.exit(2)
        _fail(f"{message} See qwen2 --help.", 2, error)
    else:
        if code == INTERRUPTED:
            print("qwen2: interrupted", file=sys.stderr)
        sys.exit(code)


def _fail(message: str, code: int, error: BaseException) -> None:
    if "--debug" in sys.argv:
        raise error
    print(f"qwen2: {message}", file=sys.stderr)
    sys.exit(code)
