"""`qwen2 score`: how well a model predicts text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from qwen2.cli.options import Device, Dtype, Extend, Json, Model, Quantize, Threads, load_for


def score(
    model: Model,
    files: Annotated[list[Path], typer.Argument(help="Text files, in UTF-8.")],
    context: Annotated[
        int | None, typer.Option(min=2, help="Tokens a prediction may see; 2,048 when not given.")
    ] = None,
    extend: Extend = "dca+yarn",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Perplexity per token and bits per byte of files; each file is one document."""
    from qwen2.common.errors import UserError
    from qwen2.common.files import read_text
    from qwen2.common.progress import Progress
    from qwen2.common.runtime import set_threads
    from qwen2.evaluate.score import DEFAULT_CONTEXT, Score, score_text

    texts = [read_text(file) for file in files]
    if not any(texts):
        raise UserError(f"{files[0]}: nothing to score; give a file with text")
    set_threads(threads)
    language_model, tokenizer = load_for(model, dtype, device, context, extend, quantize)
    total = Score()
    with Progress("score", sum(len(text.encode()) for text in texts)) as progress:
        for text in texts:
            total += score_text(language_model, tokenizer, text, context or DEFAULT_CONTEXT)
            progress.update(total.bytes)
    result = {
        "bits_per_byte": total.bits_per_byte,
        "perplexity": total.perplexity,
        "tokens": total.tokens,
        "bytes": total.bytes,
    }
    if as_json:
        print(json.dumps(result))
    else:
        print(
            f"{total.bits_per_byte:.4f} bits per byte, perplexity {total.perplexity:.3f} "
            f"({total.tokens:,} tokens, {total.bytes:,} bytes)"
        )
