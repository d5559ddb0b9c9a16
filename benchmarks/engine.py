"""The engine beside llama.cpp, onnxruntime-genai and openvino-genai: the same weights, in turn.

    python benchmarks/prepare_peers.py MODEL.gguf PEERS ...   (once; it says how to get the peers)
    python benchmarks/engine.py --model MODEL.gguf --peers PEERS --llama-bin DIR \\
        --peer-python PYTHON [--only int8 bf16 int4 concurrent prefix memory] [--json] [--out DIR]

Ours is the whole engine with sampling and detokenizing; peers are measured at their best: llama.cpp
by its server's own clock, with the flags that a first look finds fastest for each figure. Decode is
64 tokens after a prompt of 64; prefill goes to the first token, without a cache of prefixes. Ratios
without a peer's name are against llama.cpp (Q8_0, BF16, Q4_K_M). A peer that isn't there is left
out, and `left_out` says why.

Other figures: `engine_overhead` is the share of a decode step that is not the model's pass;
`prefix_ttft_ratio` the first time to first token over the repeated one; `rss_ratio` a fresh
process's peak memory over weights and the cache in use; of both overhead and memory the worst
number type counts. `bandwidth_gb_s` is what the same threads read between the decode runs.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import itertools
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from harness import alternate, finish, options, ratios, spread
from peers.processes import Absent, Child, LlamaServer, Side, closing
from qwen2.common.progress import say
from qwen2.common.spread import percentile
from qwen2.model.hub import open_checkpoint
from qwen2.serve.bench import Load, Sample, decode_rate, run_load
from qwen2.serve.started import started

PROMPT, NEW = 64, 64
PREFIX, TAIL = 1500, 16
CLIENTS = 8
GGUF = {"int8": "Q8_0.gguf", "bf16": "BF16.gguf", "int4": "Q4_K_M.gguf"}
FLAGS = (  # of llama-server; the fastest for a figure is used for it
    ("-fa", "on"),
    ("-fa", "off"),
    ("-fa", "on", "-ub", "2048"),
    ("-fa", "off", "-ub", "2048"),
)
SLOTS = ((), ("--kv-unified",))
SECTIONS = ("int8", "bf16", "int4", "concurrent", "prefix", "memory")


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    real = os.environ.get("QWEN2_REAL_CHECKPOINT")
    parser.add_argument("--model", default=real, help="a checkpoint, as everywhere")
    parser.add_argument("--int8", help="the same model, converted; else it is rounded on load")
    parser.add_argument("--int4", help="likewise")
    parser.add_argument("--peers", type=Path, help="what prepare_peers.py has written")
    parser.add_argument("--llama-bin", type=Path, help="the folder of llama-server")
    parser.add_argument("--peer-python", help="a Python that has the other peers")
    parser.add_argument("--threads", type=int, default=2, help="of each side")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    chosen = parser.parse_args()
    if not chosen.model:
        parser.error("give --model, or set QWEN2_REAL_CHECKPOINT")
    bench = Bench(chosen)
    for section in chosen.only:
        say(f"{section} ...")
        getattr(bench, section)()
    bench.conclude()
    finish("engine", {**bench.figures, "threads": chosen.threads}, chosen)


class Bench:
    """The sections, and the figures that they gather."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.chosen = chosen
        self.figures: dict[str, Any] = {}
        self.versions: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self.flags: dict[str, str] = {}
        tokenizer = open_checkpoint(chosen.model).tokenizer()
        files = sorted(Path(__file__).parent.glob("*.py"))
        self.text = tokenizer.encode("\n".join(file.read_text() for file in files))

    def int8(self) -> None:
        """8 bits, beside all peers."""
        self._side_by_side("int8", ("llama", "onnx", "openvino"))

    def bf16(self) -> None:
        """The published type."""
        self._side_by_side("bf16", ("llama",))

    def int4(self) -> None:
        """4 bits."""
        self._side_by_side("int4", ("llama", "onnx"))

    def concurrent(self) -> None:
        """8 requests at once through a server, in 8 bits."""
        with ExitStack() as stack:
            ours = self._our_crowd(stack)
            theirs = self._llama_crowd(stack)
            runs: dict[str, Callable[[], float]] = {}
            waits: dict[str, list[float]] = {}
            for name, crowd in {"ours": ours, "llama": theirs}.items():
                if crowd is None:
                    continue
                waits[name] = []
                runs[name] = crowd_run(crowd, self._prompts(PROMPT), waits[name])
            speed = alternate(runs, self.chosen.rounds)
        for name in runs:
            prefix = "concurrent_8" + ("" if name == "ours" else f"_{name}")
            self.figures[f"{prefix}_tokens_per_second"] = spread(speed[name])
            self.figures[f"{prefix}_ttft_p99"] = spread(waits[name][1:])
        if "llama" in runs:
            self.figures["concurrent_8_ratio"] = ratios(speed["ours"], speed["llama"])
            # Of seconds less is better, so theirs is over ours.
            self.figures["ttft_p99_ratio"] = ratios(waits["llama"][1:], waits["ours"][1:])

    def prefix(self) -> None:
        """A long beginning that comes again with another end."""
        ours = self._ours("int8")
        with closing(ours):
            prompts = self._prompts(PREFIX + 2 * TAIL)

            def first_over_repeated() -> float:
                prompt = next(prompts)
                tails = [prompt[PREFIX:][:TAIL], prompt[-TAIL:]]
                first, again = ours.call("repeated", prefix=prompt[:PREFIX], tails=tails)
                return first / again

            ratio = alternate({"ours": first_over_repeated}, self.chosen.rounds)["ours"]
        self.figures["prefix_ttft_ratio"] = spread(ratio)

    def memory(self) -> None:
        """Peaks of fresh processes, one after another."""
        for kind in ("bf16", "int8", "int4"):
            peaks = []
            for _, prompt in zip(range(self.chosen.rounds), self._prompts(512), strict=False):
                ours = self._ours(kind)
                with closing(ours):
                    peaks.append(found := ours.call("memory", prompt=prompt, new=NEW))
            held = [peak["weights"] + peak["kv"] for peak in peaks]
            self.figures[f"{kind}_rss_ratio"] = spread(
                peak["peak"] / size for peak, size in zip(peaks, held, strict=True)
            )
            self.figures[f"{kind}_rss_bytes"] = found

    def conclude(self) -> None:
        """The worst of what every number type has, and what was measured."""
        for name in ("engine_overhead", "rss_ratio"):
            found = [self.figures[f"{kind}_{name}"] for kind in GGUF if f"{kind}_{name}" in
                     self.figures]  # fmt: skip
            if found:
                self.figures[name] = max(found, key=lambda figure: figure["median"])
        self.figures |= {
            "versions": self.versions, "llama_flags": self.flags, "left_out": self.left_out,
        }  # fmt: skip

    def _side_by_side(self, kind: str, peers: tuple[str, ...]) -> None:
        """Decode and prefill of all sides in turn, with bandwidth and overhead between."""
        shapes = {"decode": PROMPT, "prefill_512": 512, "prefill_2048": 2048}
        best = self._best_flags(kind, shapes) if "llama" in peers else {}
        with ExitStack() as stack:
            ours = self._ours(kind)
            stack.enter_context(closing(ours))
            others = {peer: self._peer(stack, peer, kind) for peer in peers if peer != "llama"}
            for figure, length in shapes.items():
                with self._llama(kind, best.get(figure)) as llama:
                    named = {"ours": ours, "llama": llama, **others}
                    sides = {name: side for name, side in named.items() if side is not None}
                    self._figure(kind, figure, length, sides)

    def _figure(self, kind: str, figure: str, length: int, sides: dict[str, Side]) -> None:
        overhead: list[float] = []
        runs: dict[str, Callable[[], float]] = {
            name: speed_run(side, figure, self._prompts(length), overhead)
            for name, side in sides.items()
        }
        ours = sides["ours"]
        assert isinstance(ours, Child)
        if figure == "decode":
            runs["bandwidth"] = lambda: ours.call("bandwidth")
        speed = alternate(runs, self.chosen.rounds)
        if bandwidth := speed.pop("bandwidth", None):
            size = ours.call("bytes_per_token") / 1e9
            self.figures.setdefault("bandwidth_gb_s", spread(bandwidth))
            self.figures[f"{kind}_decode_bandwidth_share"] = spread(
                size * rate / most for rate, most in zip(speed["ours"], bandwidth, strict=True)
            )
            self.figures[f"{kind}_engine_overhead"] = spread(overhead[1:])
        for name, values in speed.items():
            self.versions[name] = sides[name].version
            prefix = f"{kind}_{figure}" + ("" if name in ("ours", "llama") else f"_{name}")
            if name != "ours":
                self.figures[f"{prefix}_ratio"] = ratios(speed["ours"], values)
                prefix = f"{kind}_{figure}_{name}"
            self.figures[f"{prefix}_tokens_per_second"] = spread(values)

    def _ours(self, kind: str) -> Child:
        model = getattr(self.chosen, kind, None) or self.chosen.model
        quantize = "none" if kind == "bf16" or model != self.chosen.model else kind
        return Child(sys.executable, "our_child.py", model, quantize, self.chosen.threads)

    def _peer(self, stack: ExitStack, peer: str, kind: str) -> Child | None:
        """A peer's child with its model; None, and a reason, where it cannot be."""
        try:
            if self.chosen.peer_python is None or self.chosen.peers is None:
                raise Absent("no --peer-python or no --peers")
            place = self.chosen.peers / f"{peer}-{kind}"
            if not place.exists():
                raise Absent(f"no {place.name} in --peers")
            child = Child(self.chosen.peer_python, f"{peer}_child.py", place, self.chosen.threads)
        except Absent as reason:
            self.left_out[f"{peer}_{kind}"] = str(reason)
            return None
        stack.enter_context(closing(child))
        return child

    @contextmanager
    def _llama(self, kind: str, flags: tuple[str, ...] | None) -> Iterator[LlamaServer | None]:
        if flags is None:
            yield None
            return
        server = self._llama_server(kind, ("-np", "1", "-c", "4096", *flags))
        with closing(server):
            yield server

    def _llama_server(self, kind: str, flags: tuple[str, ...]) -> LlamaServer:
        if self.chosen.llama_bin is None:
            raise Absent("no --llama-bin")
        path = (self.chosen.peers or Path()) / GGUF[kind]
        return LlamaServer(self.chosen.llama_bin, path, self.chosen.threads, *flags)

    def _best_flags(self, kind: str, shapes: dict[str, int]) -> dict[str, tuple[str, ...]]:
        """llama-server's fastest flags by figure; none, and a reason, where it cannot be."""
        best: dict[str, tuple[float, tuple[str, ...]]] = {}
        try:
            for flags in FLAGS:
                with self._llama(kind, flags) as server:
                    assert server is not None
                    for figure, length in shapes.items():
                        run = speed_run(server, figure, self._prompts(length), [])
                        run()
                        speed = statistics.median(run() for _ in range(3))
                        best[figure] = max(best.get(figure, (0.0, flags)), (speed, flags))
        except Absent as reason:
            self.left_out[f"llama_{kind}"] = str(reason)
            return {}
        chosen = {figure: flags for figure, (_, flags) in best.items()}
        self.flags |= {f"{kind}_{figure}": " ".join(flags) for figure, flags in chosen.items()}
        return chosen

    def _our_crowd(self, stack: ExitStack) -> Callable[[list[list[int]]], list[Sample]]:
        """Our server where the package has one, else the engine's thread."""
        if importlib.util.find_spec("qwen2.cli.serve") is not None:
            model = self.chosen.int8 or self.chosen.model
            rounded = ["--dtype=bf16"] + ([] if self.chosen.int8 else ["--quantize=int8"])
            threads = f"--threads={self.chosen.threads}"
            url = stack.enter_context(started([model, *rounded, threads]))
            self.figures["concurrent_8_through"] = "http"
            return through_http(url)
        ours = self._ours("int8")
        stack.enter_context(closing(ours))
        self.figures["concurrent_8_through"] = "the engine's thread"
        return lambda prompts: [
            Sample(**sample) for sample in ours.call("together", prompts=prompts, new=NEW)
        ]

    def _llama_crowd(self, stack: ExitStack) -> Callable[[list[list[int]]], list[Sample]] | None:
        """llama-server with a slot for each, and the flags that are fastest for so many."""
        slots = ("-np", str(CLIENTS), "-c", str(CLIENTS * 4 * (PROMPT + NEW)))
        best: tuple[float, tuple[str, ...]] = (0.0, ())
        try:
            for flags in ((*a, *b) for a, b in itertools.product(FLAGS[:2], SLOTS)):
                with closing(server := self._llama_server("int8", (*slots, *flags))):
                    run = crowd_run(through_http(server.url), self._prompts(PROMPT), [])
                    run()
                    best = max(best, (run(), flags))
            server = self._llama_server("int8", (*slots, *best[1]))
        except Absent as reason:
            self.left_out["llama_concurrent"] = str(reason)
            return None
        stack.enter_context(closing(server))
        self.flags["concurrent_8"] = " ".join(best[1])
        return through_http(server.url)

    def _prompts(self, length: int) -> Iterator[list[int]]:
        """Prompts of so many tokens, none of which begins as another; for all sides the same."""
        for number in itertools.count():
            begin = 997 * number % len(self.text)
            text = itertools.islice(itertools.cycle(self.text), begin, begin + length)
            yield list(text)


def speed_run(
    side: Side, figure: str, prompts: Iterator[list[int]], overhead: list[float]
) -> Callable[[], float]:
    """One measurement, with the next prompt; what it tells of overhead is appended."""

    def run() -> float:
        prompt = next(prompts)
        done = side.decode(prompt, NEW) if figure == "decode" else side.prefill(prompt)
        if "overhead" in done:
            overhead.append(done["overhead"])
        return done["tokens_per_second"]

    return run


def crowd_run(
    crowd: Callable[[list[list[int]]], list[Sample]],
    prompts: Iterator[list[int]],
    waits: list[float],
) -> Callable[[], float]:
    """Tokens per second of all clients while all decode; p99 to the first token is appended."""

    def run() -> float:
        samples = crowd(list(itertools.islice(prompts, CLIENTS)))
        if failed := [sample.error for sample in samples if sample.error]:
            raise Absent(f"a request failed: {failed[0]}")
        waits.append(percentile([sample.stamps[0] - sample.due for sample in samples], 99))
        return decode_rate(samples)

    return run


def through_http(url: str) -> Callable[[list[list[int]]], list[Sample]]:
    """All prompts at once to a server."""
    load = Load(requests=CLIENTS, concurrency=CLIENTS, max_tokens=NEW)
    return lambda prompts: asyncio.run(run_load(url, load, prompts=prompts))


if __name__ == "__main__":
    main()
