"""`qwen2 bench`: how fast a model is on this machine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen2.cli.options import Device, Dtype, Json, Model, Quantize, Threads, load_for

if TYPE_CHECKING:
    from qwen2.inference import Engine

app = typer.Typer(help="Measure decode, prefill, or a server under load.", no_args_is_help=True)

PromptTokens = Annotated[int, typer.Option(min=1, help="Tokens of a prompt.")]
NewTokens = Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Tokens to generate.")]
Runs = Annotated[int, typer.Option(min=1, help="Measurements, after one to warm up.")]


@app.command()
def decode(
    model: Model,
    prompt_tokens: PromptTokens = 64,
    max_tokens: NewTokens = 64,
    runs: Runs = 5,
    quantize: Quantize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Tokens per second of one request after its first token, sampling and text included."""
    from qwen2.inference import bench

    engine, figures = _engine(model, quantize, dtype, device, threads, prompt_tokens + max_tokens)
    overhead: list[float] = []

    def run(number: int) -> float:
        prompt = bench.random_prompt(prompt_tokens, number)
        done = bench.decode(engine, prompt, max_tokens)
        overhead.append(done.overhead)
        return done.tokens_per_second

    speed = _measure("decode", runs, run)
    figures |= {"engine_overhead": round(sum(overhead[1:]) / runs, 4)}
    _print(figures, speed, f"decode, {max_tokens} tokens after {prompt_tokens}", as_json)


@app.command()
def prefill(
    model: Model,
    prompt_tokens: PromptTokens = 512,
    runs: Runs = 5,
    quantize: Quantize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prompt tokens per second until the first token."""
    from qwen2.inference import bench

    engine, figures = _engine(model, quantize, dtype, device, threads, prompt_tokens + 1)

    def run(number: int) -> float:
        return prompt_tokens / bench.first_token(engine, bench.random_prompt(prompt_tokens, number))

    _print(figures, _measure("prefill", runs, run), f"prefill of {prompt_tokens} tokens", as_json)


@app.command()
def serve(
    model: Annotated[
        str | None, typer.Argument(help="Serve this model here, and load it; or give --url.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="A server that runs, of any make.")] = None,
    key: Annotated[
        str | None, typer.Option("--api-key", envvar="QWEN2_API_KEY", help="For --url.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Closed loop: requests at a time; 8 when not given.")
    ] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: requests a second, at random times.")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a run.")] = 32,
    prompt_tokens: PromptTokens = 64,
    max_tokens: NewTokens = 64,
    runs: Annotated[int, typer.Option(min=1, help="Runs, after one request to warm up.")] = 1,
    seed: Annotated[int, typer.Option(help="Of prompts and of arrivals.")] = 0,
    quantize: Quantize = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Throughput, time to first token and latency between tokens of a server under load."""
    import contextlib

    from qwen2.common.errors import UserError
    from qwen2.common.progress import Progress
    from qwen2.serve.bench import Load, measure
    from qwen2.serve.started import started

    if (model is None) == (url is None):
        raise UserError("give a model to serve, or --url of a server that runs; one of the two")
    if concurrency is None and rate is None:
        concurrency = 8
    load = Load.parse(
        {
            "requests": requests,
            "prompt_tokens": prompt_tokens,
            "max_tokens": max_tokens,
            "concurrency": concurrency,
            "rate": rate,
            "seed": seed,
        },
        "load",
    )
    place: contextlib.AbstractContextManager[str] = contextlib.nullcontext(url or "")
    if model is not None:
        options = {"quantize": quantize, "dtype": dtype, "device": device, "threads": threads}
        given = [f"--{name}={value}" for name, value in options.items() if value is not None]
        place = started([model, *given])
    with place as server, Progress("serve", runs * requests) as progress:
        figures = measure(server, load, runs, key, progress.update)
    _print_load(figures, load.model_dump(exclude_none=True), as_json)


def _engine(
    model: str,
    quantize: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    tokens: int,
) -> tuple[Engine, dict[str, Any]]:
    """An engine with room for one sequence, and what is measured."""
    from qwen2.common.errors import UserError
    from qwen2.common.runtime import set_threads
    from qwen2.inference import Engine, EngineConfig

    in_use = set_threads(threads)
    loaded, tokenizer = load_for(model, dtype, device, None, "none", quantize)
    if tokens > loaded.config.context_length:
        raise UserError(f"{tokens} tokens are beyond the context of {loaded.config.context_length}")
    # Every prompt is to be computed.
    engine = Engine(loaded, tokenizer, EngineConfig(prefix_cache=False))
    quantisation = loaded.config.quantisation
    kind = quantisation.method if quantisation else str(loaded.dtype).removeprefix("torch.")
    return engine, {"weights": kind, "threads": in_use, "device": str(loaded.device)}


def _measure(what: str, runs: int, run: Callable[[int], float]) -> list[float]:
    """The figure of each run, after one that is not counted."""
    from qwen2.common.progress import Progress

    speed: list[float] = []
    with Progress(what, runs + 1) as progress:
        for number in range(runs + 1):
            speed.append(run(number))
            progress.update(number + 1, tokens_per_second=speed[-1])
    return speed[1:]


def _print(figures: dict[str, Any], speed: list[float], what: str, as_json: bool) -> None:
    from qwen2.common.hardware import hardware
    from qwen2.common.spread import spread

    tokens_per_second = spread(speed)
    if as_json:
        result = {"tokens_per_second": tokens_per_second, "runs": len(speed)}
        print(json.dumps(result | figures | {"hardware": hardware()}))
        return
    median, least, most = tokens_per_second.values()
    print(f"{median:.1f} tokens per second ({least:.1f} to {most:.1f}): {what}")
    print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in figures.items()))
    print(f"{len(speed)} runs on {hardware()}")


def _print_load(figures: dict[str, Any], load: dict[str, Any], as_json: bool) -> None:
    from qwen2.common.hardware import hardware

    if as_json:
        print(json.dumps(figures | {"load": load, "hardware": hardware()}))
        return
    speed = figures["tokens_per_second"]
    print(f"{speed['median']:.1f} tokens per second ({speed['min']:.1f} to {speed['max']:.1f})")
    print(f"{figures['requests_per_second']['median']:.2f} requests per second")
    for name in ("time_to_first_token", "inter_token_latency", "request_latency"):
        if seconds := figures[name]:
            words = name.replace("_", " ")
            print(f"{words}: p50 {seconds['p50']:.3f} s, p99 {seconds['p99']:.3f} s")
    print(f"{figures['requests']} requests, {figures['errors']} failed")
    for message, count in figures["error_messages"].items():
        print(f"  {count} times: {message}")
