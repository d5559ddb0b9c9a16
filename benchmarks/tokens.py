"""Text to shards beside tiktoken alone: the same text and cores, ours with all that is written.

Ours is normalisation, encoding, the shard, its origins, their checksums and the flush to the disk,
a part of the text for each process. tiktoken's `encode_ordinary_batch` gives lists of ids on as
many threads and writes nothing. Speed by the clock, and by the CPU, which holds on a busy machine
too. Also here: how packing cuts and pads documents of these lengths,
and how long it takes for a million.

    python benchmarks/tokens.py [--documents FILE.jsonl] [--megabytes 24]
"""

from __future__ import annotations

import gc
import itertools
import json
import multiprocessing
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import tiktoken
from numpy.typing import NDArray

from harness import alternate, finish, options, ratios, spread
from qwen2.corpus import Document
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.tokenizer import PRE_TOKENS
from qwen2.tokens.best_fit import BestFitPlan, BestFitRows
from qwen2.tokens.packing import StreamRows
from qwen2.tokens.shard_file import write_shard
from qwen2.tokens.shard_index import index_shards
from qwen2.tokens.shards import Shards
from qwen2.tokens.tokenize import tokenize_documents

PARTS = 2
CONTEXTS = (512, 2048, 4096)

coder = Tokenizer.qwen2()
parts: list[list[Document]] = []  # given to processes by forking


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--documents", type=Path, help="JSON lines with text; else this Python's")
    parser.add_argument("--megabytes", type=float, default=24.0)
    chosen = parser.parse_args()
    fill_parts(chosen.documents, chosen.megabytes * 1e6)
    with tempfile.TemporaryDirectory() as place:
        figures = speeds(Path(place), chosen.rounds)
        lengths = Shards(Path(place) / "once").lengths
    figures |= {"packing": {str(context): packing(lengths, context) for context in CONTEXTS}}
    finish("tokens", figures | {"a_million_documents": packing_time(1_000_000)}, chosen)


def fill_parts(path: Path | None, size: float) -> None:
    """Parts of equal size, whose documents are spread evenly over the file."""
    texts = list(lines(path) if path else standard_library())
    total = sum(len(text.encode()) for text in texts)
    texts = texts[:: max(1, int(total // size))]
    half = sum(map(len, texts)) / PARTS
    ends = np.cumsum([len(text) for text in texts])
    cut = [0, *(int(np.searchsorted(ends, half * part)) for part in range(1, PARTS)), len(texts)]
    for start, stop in itertools.pairwise(cut):
        some = enumerate(texts[start:stop], start)
        parts.append([Document(text, f"text/{i}", "benchmark", "text") for i, text in some])


def lines(path: Path) -> Iterator[str]:
    """The texts of a file of JSON lines."""
    with path.open() as file:
        for line in file:
            yield json.loads(line)["text"]


def standard_library() -> Iterator[str]:
    """Code and prose of Python's standard library."""
    yield from topics.topics.values()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if "site-packages" not in path.parts:
            yield path.read_text(errors="replace")


def write_part(folder: Path, part: int) -> float:
    """One part of the text as a shard, on one thread; seconds of CPU."""
    began = time.process_time()
    encoded = tokenize_documents(parts[part], lambda texts: coder.encode_arrays(texts, threads=1))
    write_shard(
        folder / f"shard-{part:05d}.safetensors",
        encoded,
        kinds=["text"],
        vocab_size=coder.vocab_size,
        end_of_text=coder.end_of_text_id,
        tokenizer="published",
    )
    return time.process_time() - began


def speeds(place: Path, rounds: int) -> dict[str, Any]:
    """Megabytes a second of text, and ratios, on one core and on two."""
    texts = [document.text for part in parts for document in part]
    size = sum(len(text.encode()) for text in texts) / 1e6
    plain = tiktoken.Encoding(
        "plain", pat_str=PRE_TOKENS, mergeable_ranks=dict(coder.ranks), special_tokens={}
    )
    coder.encode("warm")
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(2, fork) as pool:

        def ours(processes: int) -> float:
            work = [place / "again"] * PARTS, range(PARTS)
            spent = (pool.map if processes > 1 else map)(write_part, *work)
            cpu = sum(spent)
            shutil.rmtree(place / "again")
            return cpu

        def peer(threads: int) -> float:
            began = time.process_time()
            plain.encode_ordinary_batch(texts, num_threads=threads)
            return time.process_time() - began

        list(pool.map(write_part, [place / "once"] * PARTS, range(PARTS)))
        names = [f"shard-{part:05d}.safetensors" for part in range(PARTS)]
        index = index_shards(place / "once", names)
        figures: dict[str, Any] = {}
        for name, cores in (("one", 1), ("two", 2)):
            wall, cpu = in_turn({"ours": ours, "tiktoken": peer}, cores, size, rounds)
            figures[f"{name}_tiktoken_ratio"] = ratios(wall["ours"], wall["tiktoken"])
            figures[f"{name}_tiktoken_cpu_ratio"] = ratios(cpu["ours"], cpu["tiktoken"])
            for who, column in wall.items():
                figures[f"{name}_{who}_megabytes_per_second"] = spread(column)
            for who, column in cpu.items():
                figures[f"{name}_{who}_megabytes_per_cpu_second"] = spread(column)
    return figures | {
        "documents": len(texts),
        "megabytes": round(size, 2),
        "tokens": index.tokens_by_kind["text"],
    }


def in_turn(
    runs: Mapping[str, Callable[[int], float]], cores: int, size: float, rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Megabytes a second, and a second of CPU: what others do on the machine slows only one."""
    cpu: dict[str, list[float]] = {name: [] for name in runs}

    def speed(name: str) -> float:
        gc.collect()
        began = time.perf_counter()
        cpu[name].append(size / runs[name](cores))
        return size / (time.perf_counter() - began)

    wall = alternate({name: lambda name=name: speed(name) for name in runs}, rounds)
    return wall, {name: column[1:] for name, column in cpu.items()}  # after one to warm up


def seconds(run: Callable[[], Any]) -> float:
    """How long `run` takes, after what was left over is collected."""
    gc.collect()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def packing(lengths: NDArray[np.int64], context: int) -> dict[str, Any]:
    """How many of the documents that fit into a row are cut, and the share of padding."""
    short = lengths <= context
    stream = StreamRows(lengths, context, 0)
    pieces = np.zeros(len(lengths), np.int64)
    for row in range(int(lengths.sum()) // context):
        for piece in stream.pieces(row):
            pieces[piece.document] += 1
    plan = BestFitPlan(lengths, context)
    return {
        "short_documents": int(short.sum()),
        "stream_cuts_of_short": round(float((pieces[short] > 1).mean()), 4),
        "best_fit_cuts_of_items": round(plan.cuts / max(1, plan.items), 6),
        "best_fit_padding": round(plan.padding / (plan.rows * context), 6),
    }


def packing_time(documents: int, context: int = 2048) -> dict[str, float]:
    """Seconds until the first rows of an epoch are known."""
    draw = np.random.default_rng(0).normal(6.5, 1.3, documents)
    lengths = np.ceil(np.exp(draw)).astype(np.int64)
    stream, best_fit = StreamRows(lengths, context, 0), BestFitRows(lengths, context, 0)
    return {
        "stream_seconds": round(seconds(lambda: stream.pieces(0)), 2),
        "best_fit_seconds": round(seconds(lambda: [best_fit.pieces(row) for row in range(99)]), 2),
    }


if __name__ == "__main__":
    main()
