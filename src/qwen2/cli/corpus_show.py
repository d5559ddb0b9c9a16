"""`qwen2 corpus show`: any batch as text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen2.cli.options import Json

if TYPE_CHECKING:
    from rich.text import Text

    from qwen2.tokens.show import ShownPiece

COLOURS = ("cyan", "green", "yellow", "magenta", "blue", "red", "bright_cyan", "bright_green")


def show(
    where: Annotated[
        str, typer.Argument(help="A folder of shards, of a training run, or a training recipe.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="Replace the recipe's; for shards: context, rows, seed, packing, weights.",
        ),
    ] = None,
    step: Annotated[int, typer.Option(min=1, help="Which, as metrics.jsonl counts them.")] = 1,
    rank: Annotated[int, typer.Option(min=0, help="Whose part of it.")] = 0,
    world_size: Annotated[int, typer.Option(min=1, help="Ranks that share each step.")] = 1,
    document: Annotated[
        int | None, typer.Option(min=0, help="Show this document instead, by its number.")
    ] = None,
    id_: Annotated[str | None, typer.Option("--id", help="Or by its id in the corpus.")] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder; found when it lies near the shards.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to this file instead.")] = None,
    as_json: Json = False,
) -> None:
    """Show what a training step reads: every piece of a document, its origin and its text."""
    import json

    from qwen2.common.errors import UserError
    from qwen2.common.files import durable_write
    from qwen2.pipeline.batches import open_batches
    from qwen2.tokens.show import show_batch, show_document
    from qwen2.tokens.show_html import batch_page

    if document is not None and id_ is not None:
        raise UserError("give either --document or --id")
    batches = open_batches(where, overrides or [], tokenizer)
    shards = batches.shards
    if id_ is not None:
        document = shards.find(id_)
    if document is not None:
        if document >= len(shards):
            raise UserError(f"document {document}: {where} has {len(shards):,}, from 0 on")
        title = f"Document {document:,} of {len(shards):,}"
        rows = [[show_document(shards, document, batches.tokenizer)]]
    else:
        title = f"Step {step}, rank {rank} of {world_size}"
        loaders = batches.at(step, rank, world_size)
        rows = [row for loader in loaders for row in show_batch(loader, batches.tokenizer)]
    if html is not None:
        durable_write(html, batch_page(title, rows, shards.index.kinds).encode())
    if as_json:
        pieces = [[piece.as_json() for piece in row] for row in rows]
        print(json.dumps({"title": title, "rows": pieces}, ensure_ascii=False))
    elif html is not None:
        print(html)
    else:
        _print(title, rows, shards.index.kinds, ids=document is not None)


def _print(
    title: str, rows: Sequence[Sequence[ShownPiece]], kinds: Sequence[str], ids: bool
) -> None:
    """On the terminal in colour, elsewhere plain; `ids`: token by token."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(title, style="bold")
    for number, row in enumerate(rows):
        if not ids:
            console.rule(f"row {number}", align="left", style="dim")
        at = 0
        for piece in row:
            console.print(_head(piece, at, kinds))
            console.print(_body(piece))
            if ids:
                console.print(" ".join(map(str, piece.ids)), style="dim")
            at += piece.tokens


def _colour(piece: ShownPiece, kinds: Sequence[str]) -> str:
    return COLOURS[kinds.index(piece.kind) % len(COLOURS)] if piece.kind else "dim"


def _head(piece: ShownPiece, at: int, kinds: Sequence[str]) -> Text:
    """The place in the row, and what lies there."""
    from rich.text import Text

    from qwen2.tokens.show import visible

    head = Text(f"▌{at:,} to {at + piece.tokens:,}  {piece.title}", _colour(piece, kinds))
    if piece.where_from:
        head.append(f"\n▌{visible(piece.where_from)}", "dim")
    return head


def _body(piece: ShownPiece) -> Text:
    from rich.text import Text

    from qwen2.tokens.show import visible

    cut = "✂"
    body = Text(cut if piece.start else "", "bold red")
    for text, special in piece.segments:
        body.append(visible(text), "reverse" if special else "default")
    return body.append(cut if piece.stop < piece.length else "", "bold red")
