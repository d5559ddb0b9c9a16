"""`qwen2 serve`: the OpenAI-compatible server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwen2.cli.options import (
    Context,
    Device,
    Draft,
    Dtype,
    Extend,
    Model,
    Quantize,
    Speculate,
    Threads,
    draft_for,
    load_for,
)


def serve(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port; 0 takes one that is free.")
    ] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File of API keys, one a line; without it none is asked.")
    ] = None,
    served_name: Annotated[
        list[str] | None,
        typer.Option(help="What the model is called; repeatable, the first is used in answers."),
    ] = None,
    max_running: Annotated[int, typer.Option(min=1, help="Requests worked on at a time.")] = 64,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait.")] = 256,
    max_batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one pass.")] = 1024,
    kv_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens the cache holds; when not given, what fits in memory."),
    ] = None,
    kv_dtype: Annotated[str, typer.Option(help="Of the cache: auto or int8.")] = "auto",
    prefix_cache: Annotated[
        bool, typer.Option(help="Keep what prompts begin with for who comes again.")
    ] = True,
    speculate: Speculate = 0,
    draft: Draft = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0.1, help="After SIGTERM, time to finish what runs.")
    ] = 30.0,
    context: Context = None,
    extend: Extend = "dca+yarn",
    quantize: Quantize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Serve a model over HTTP as OpenAI's API does, with a chat page at /."""
    from qwen2.common.errors import UserError
    from qwen2.common.runtime import set_threads
    from qwen2.inference import Engine, EngineConfig, EngineThread

    try:
        from qwen2.serve import run
        from qwen2.serve.app import create_app
        from qwen2.serve.settings import Keys, Settings
    except ModuleNotFoundError as error:
        raise UserError(f"serve needs {error.name}: pip install 'qwen2[serve]'") from None

    config = EngineConfig.parse(
        {
            "max_running": max_running,
            "max_queue": max_queue,
            "max_batch_tokens": max_batch_tokens,
            "kv_tokens": kv_tokens,
            "kv_dtype": kv_dtype,
            "prefix_cache": prefix_cache,
            "speculate": speculate,
        },
        "engine",
    )
    keys = Keys.read(api_key_file) if api_key_file is not None else Keys()
    # Before the model is loaded, so that what is wrong here is said at once.
    bound = run.bind(host, port)
    settings = Settings(
        tuple(served_name or [_name(model)]), keys, run.allowed_hosts(bound, host, keys)
    )
    set_threads(threads)
    language_model, tokenizer = load_for(model, dtype, device, context, extend, quantize)
    guesser = draft_for(draft, tokenizer, dtype, device, quantize)
    thread = EngineThread(Engine(language_model, tokenizer, config, draft=guesser))
    app = create_app(thread, settings)
    thread.start()
    ready = f"qwen2: {settings.names[0]} is served at {run.url_of(bound)}, a chat page too"
    try:
        run.run(app, bound, settings.limits, ready, drain_seconds, thread.stop)
    finally:
        thread.stop()


def _name(model: str) -> str:
    """A hub name as it is; of a file or folder its name."""
    path = Path(model)
    if not path.exists():
        return model
    return path.stem if path.is_file() else path.resolve().name
