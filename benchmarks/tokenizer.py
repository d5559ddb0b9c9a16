"""Encoding speed beside tiktoken and Hugging Face tokenizers: the same text, vocabulary, threads.

Runs are interleaved, so that whatever else the machine does falls on all alike. Ratios are our
speed over the peer's (greater than 1: we are faster), from the times of the same round. tiktoken
and the Hugging Face tokenizer give the same ids, which is checked first; tiktoken gets the text as
it is, without normalisation.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import tiktoken
import tokenizers

from qwen2.common.cores import available_cores
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.tokenizer import PRE_TOKENS

ROUNDS = 5
LIMIT = 12_000_000  # characters
PARAGRAPH = 2_000  # characters of a document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file too")
    options = parser.parse_args()
    figures = measure(documents())
    text = json.dumps(figures, indent=None if options.json else 2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n")


def documents() -> list[str]:
    """Code and prose of the standard library in documents of 2,000 characters."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    code = (p.read_text(errors="replace") for p in paths if "site-packages" not in p.parts)
    text = "\n".join([*topics.topics.values(), *code])[:LIMIT]
    return [text[i : i + PARAGRAPH] for i in range(0, len(text), PARAGRAPH)]


def measure(texts: list[str]) -> dict[str, Any]:
    """Times and ratios of single-threaded and batch encoding of `texts`."""
    ours = Tokenizer.qwen2()
    plain = tiktoken.Encoding(
        "plain", pat_str=PRE_TOKENS, mergeable_ranks=dict(ours.ranks), special_tokens={}
    )
    with tempfile.TemporaryDirectory() as folder:
        ours.save(folder)
        library = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json")
    library.encode_special_tokens = True
    threads = available_cores()
    runs: dict[str, Callable[[], Any]] = {
        "single_ours": lambda: [ours.encode(text) for text in texts],
        "single_tiktoken": lambda: [plain.encode_ordinary(text) for text in texts],
        "batch_ours": lambda: ours.encode_batch(texts),
        "batch_tiktoken": lambda: plain.encode_ordinary_batch(texts, num_threads=threads),
        "batch_hf": lambda: library.encode_batch(texts, add_special_tokens=False),
    }
    expected = ours.encode_batch(texts)
    assert [encoding.ids for encoding in library.encode_batch(texts)] == expected
    del expected

    size = sum(len(text.encode()) for text in texts) / 1e6
    figures: dict[str, Any] = {}
    for mine, peer in [
        ("single_ours", "single_tiktoken"),
        ("batch_ours", "batch_tiktoken"),
        ("batch_ours", "batch_hf"),
    ]:
        seconds = alternate([runs[mine], runs[peer]])
        figures[f"{peer}_ratio"] = spread([theirs / ours for ours, theirs in seconds])
        for name, column in zip((mine, peer), zip(*seconds, strict=True), strict=True):
            figures[f"{name}_megabytes_per_second"] = spread([size / s for s in column])
    return {
        **figures,
        "documents": len(texts),
        "megabytes": round(size, 2),
        "threads": threads,
        "runs": ROUNDS,
        "hardware": platform.processor() or platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "tiktoken": tiktoken.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def alternate(runs: list[Callable[[], Any]]) -> list[list[float]]:
    """Seconds of each run in each round, after one round to warm up; every other round backwards,
    so that none always comes after the same one."""
    rounds = []
    for number in range(ROUNDS + 1):
        seconds = [0.0] * len(runs)
        for i in range(len(runs))[:: 1 if number % 2 else -1]:
            gc.collect()
            started = time.perf_counter()
            runs[i]()
            seconds[i] = time.perf_counter() - started
        rounds.append(seconds)
    return rounds[1:]


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 3) for name, value in figures.items()}


if __name__ == "__main__":
    main()
