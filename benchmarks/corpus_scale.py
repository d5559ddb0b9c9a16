"""A corpus run as the text grows, and over two workers: `qwen2 corpus run` from files to shards.

The text is real documents, repeated with a fifth of their words changed (of every tenth copy 2 %: a
near-duplicate), so that each document is read, measured, compared and tokenised as a new one. Each
run is a process of its own, and all stages are in its figures: processor seconds of it and of its
workers, and the largest resident memory of one process. Cost is linear when seconds per MB do not
grow; two workers are compared with one on the same text, run after run (--rounds 0: they are not).
A run of 10 MB has 10 s of other things in it: imports, models, the tokenizer.

    python corpus_scale.py documents.jsonl --json

Lines of documents.jsonl have `id`, `text`, `language`.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from harness import finish, options, ratios, spread
from qwen2.common.recipes import find_recipe

CHANGED, NEARLY_SAME = 0.2, 0.02  # of a copy's words; of every tenth copy's
FILE_BYTES = 2_000_000  # so that what two workers read ends at about the same time
# A process's peak begins with that of the process that started it; this one holds all documents.
LAUNCH = """
import json, os, subprocess, sys
with open(sys.argv[1] + "/told", "wb") as told, open(sys.argv[1] + "/error", "wb") as error:
    child = subprocess.Popen(sys.argv[2:], stdout=told, stderr=error)
    _, status, usage = os.wait4(child.pid, 0)
print(json.dumps([status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024]))
"""
WORD = re.compile("[\u2e80-\u9fff\uac00-\ud7a3]|\\w+")  # a letter, where scripts have no spaces

Row = dict[str, Any]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("documents", type=Path, help="JSON lines")
    parser.add_argument("--sizes", type=int, nargs="*", default=[10, 100, 1000], help="megabytes")
    parser.add_argument("--shared", type=int, default=100, help="megabytes, for two workers")
    chosen = parser.parse_args()
    with chosen.documents.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    figures: dict[str, Any] = {"load": os.getloadavg()}
    with tempfile.TemporaryDirectory() as place:
        for size in chosen.sizes:
            recipe, real = prepare(rows, size, Path(place))
            figures.setdefault("linear", []).append(run(recipe, 1, real, Path(place)))
            print(size, figures["linear"][-1], file=sys.stderr)
        if chosen.rounds:
            recipe, real = prepare(rows, chosen.shared, Path(place))
            figures |= two_workers(recipe, real, chosen.rounds, Path(place))
    first, last = figures["linear"][0], figures["linear"][-1]
    figures["cost_growth"] = last["cpu_seconds_per_mb"] / first["cpu_seconds_per_mb"]
    figures["rss_growth"] = last["peak_rss_bytes"] / first["peak_rss_bytes"]
    figures["load_at_the_end"] = os.getloadavg()
    finish("corpus_scale", figures, chosen)


def two_workers(recipe: Path, size: int, rounds: int, place: Path) -> dict[str, Any]:
    """Two workers and one, in turn, on the same text."""
    runs: dict[int, list[dict[str, Any]]] = {1: [], 2: []}
    for number in range(rounds):
        for workers in (1, 2) if number % 2 else (2, 1):
            runs[workers].append(run(recipe, workers, size, place))
    walls = {workers: [of["seconds"] for of in found] for workers, found in runs.items()}
    return {
        "two_workers_over_one": ratios(walls[1], walls[2]),
        "cpu_of_two_over_one": spread(
            two["cpu_seconds"] / one["cpu_seconds"]
            for one, two in zip(runs[1], runs[2], strict=True)
        ),
        "workers": {str(workers): found for workers, found in runs.items()},
    }


def prepare(rows: list[Row], megabytes: int, place: Path) -> tuple[Path, int]:
    """A recipe for that much text, with the filters of corpus/debian; and the text's bytes."""
    folder = place / f"text-{megabytes}"
    size = write_files(rows, megabytes * 1_000_000, folder)
    shipped = yaml.safe_load(find_recipe("corpus/debian").read_text(encoding="utf-8"))
    values = {
        "sources": [{"name": "text", "format": "jsonl", "kind": "manual", "filters": "pages",
                     "paths": [str(folder)]}],
        "filters": {"pages": shipped["filters"]["pages"]},
        "duplicates": {"paragraphs": {}},
    }  # fmt: skip
    recipe = place / f"{megabytes}.yaml"
    recipe.write_text(yaml.safe_dump(values), encoding="utf-8")
    return recipe, size


def write_files(rows: list[Row], size: int, folder: Path) -> int:
    """Write that many bytes of text, or a document more, as JSON lines; how many."""
    folder.mkdir(exist_ok=True)
    copies = grown(rows)
    number = total = 0
    while total < size:
        end = min(size, total + FILE_BYTES)
        with (folder / f"{number:05d}.jsonl").open("w", encoding="utf-8") as file:
            while total < end:
                row = next(copies)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                total += len(row["text"].encode())
        number += 1
    return total


def grown(rows: list[Row]) -> Iterator[Row]:
    """The documents, and copies of them without end."""
    yield from ({name: row[name] for name in ("id", "text", "language")} for row in rows)
    copy = 0
    while True:
        copy += 1
        for number, row in enumerate(rows):
            rng = random.Random(copy * len(rows) + number)
            share = CHANGED if number % 10 else NEARLY_SAME
            yield {
                "id": f"{row['id']}~{copy}",
                "text": changed(row["text"], share, rng),
                "language": row["language"],
            }


def changed(text: str, share: float, rng: random.Random) -> str:
    """The text with about that share of its words replaced by other words of it."""
    words = WORD.findall(text)
    return WORD.sub(lambda m: rng.choice(words) if rng.random() < share else m[0], text)


def run(recipe: Path, workers: int, size: int, place: Path) -> dict[str, Any]:
    """`qwen2 corpus run`, and what it took."""
    with tempfile.TemporaryDirectory(dir=place) as out:
        command = [sys.executable, "-m", "qwen2.cli", "corpus", "run", str(recipe), "--json",
                   "--out", f"{out}/corpus", "--workers", str(workers)]  # fmt: skip
        started = time.perf_counter()
        launched = [sys.executable, "-c", LAUNCH, out, *command]
        told = subprocess.run(launched, check=True, capture_output=True).stdout
        seconds = time.perf_counter() - started
        status, cpu, peak = json.loads(told)
        if status:
            sys.exit((Path(out) / "error").read_text()[-2000:])
        results = json.loads((Path(out) / "told").read_text())
    return {
        "megabytes": size / 1e6,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "cpu_seconds_per_mb": cpu / size * 1e6,
        "peak_rss_bytes": peak,
        "seconds_by_stage": {
            name.rpartition("-")[0] or name: of["seconds"]
            for name, of in results.items()
            if "seconds" in of
        },
    }


if __name__ == "__main__":
    main()
