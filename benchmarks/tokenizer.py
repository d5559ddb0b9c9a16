"""Encoding speed beside tiktoken and Hugging Face tokenizers: the same text, vocabulary, threads.

Runs are interleaved, so that whatever else the machine does falls on all alike. Ratios are our
speed over the peer's (greater than 1: we are faster), from the times of the same round. tiktoken
and the Hugging Face tokenizer give the same ids, which is checked first; tiktoken gets the text as
it is, without normalisation.
"""

from __future__ import annotations

import gc
import platform
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import tiktoken
import tokenizers

from harness import alternate, finish, options, ratios, spread
from qwen2.common.cores import available_cores
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.tokenizer import PRE_TOKENS

LIMIT = 12_000_000  # characters
PARAGRAPH = 2_000  # characters of a document


def main() -> None:
    chosen = options(__doc__.splitlines()[0]).parse_args()
    finish("tokenizer", measure(documents(), chosen.rounds), chosen)


def documents() -> list[str]:
    """Code and prose of the standard library in documents of 2,000 characters."""
    paths = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    code = (p.read_text(errors="replace") for p in paths if "site-packages" not in p.parts)
    text = "\n".join([*topics.topics.values(), *code])[:LIMIT]
    return [text[i : i + PARAGRAPH] for i in range(0, len(text), PARAGRAPH)]


def measure(texts: list[str], rounds: int) -> dict[str, Any]:
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
        speed = alternate(
            {name: lambda run=runs[name]: size / seconds(run) for name in (mine, peer)}, rounds
        )
        figures[f"{peer}_ratio"] = ratios(speed[mine], speed[peer])
        for name, column in speed.items():
            figures[f"{name}_megabytes_per_second"] = spread(column)
    return {
        **figures,
        "documents": len(texts),
        "megabytes": round(size, 2),
        "threads": threads,
        "versions": {
            "python": platform.python_version(),
            "tiktoken": tiktoken.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def seconds(run: Callable[[], Any]) -> float:
    """How long `run` takes, after what was left over is collected."""
    gc.collect()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
