"""What the benchmark scripts share: turns, ratios, options, and where results go.

Ratios are our speed over the peer's: greater than 1 means that we are faster. They are taken from
pairs of runs that follow each other, so that a machine whose speed drifts changes both.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from qwen2.common.hardware import hardware
from qwen2.common.spread import spread as spread

ROUNDS = 5


def options(description: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--out", type=Path, help="a folder for the dated JSON file")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pairs of runs")
    return parser


def finish(name: str, figures: Mapping[str, Any], chosen: argparse.Namespace) -> None:
    """Print the figures, and write them with hardware and commit where --out says."""
    result = {
        "benchmark": name,
        **figures,
        "runs": chosen.rounds,
        "hardware": hardware(),
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
    }
    print(json.dumps(result, indent=None if chosen.json else 2))
    if chosen.out:
        chosen.out.mkdir(parents=True, exist_ok=True)
        path = chosen.out / f"{name}-{result['date']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


def alternate(runs: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Figures of each run, taken in turn; every other round backwards, after one to warm up."""
    figures: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            figure = runs[name]()
            if number:
                figures[name].append(figure)
    return figures


def ratios(ours: Iterable[float], peer: Iterable[float]) -> dict[str, float]:
    """Pair by pair, our speed over the peer's."""
    return spread(mine / theirs for mine, theirs in zip(ours, peer, strict=True))


def commit() -> str:
    """The commit that is measured, with a + when files have changed since."""
    where = Path(__file__).parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
