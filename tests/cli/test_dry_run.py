"""`qwen2 train --dry-run`: a table, or one object; one line where it cannot be."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def dry_run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen2.cli", "train", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_prints_one_object_and_writes_nothing(tmp_path: Path) -> None:
    out = f"out={tmp_path / 'out'}"
    done = dry_run("0.5b", "--dry-run", "--world-size", 16, "--json", "mesh.tp=2", out)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["mesh"] == {
        "pp": 1, "dp_replicate": 1, "dp_shard": 8, "cp": 1, "tp": 2, "ep": 1
    }  # fmt: skip
    assert found["parameters"] == 494_032_768
    (kept,) = found["stages"]
    assert kept["total"] == kept["weights"] + kept["gradients"] + kept["optimizer"]
    assert kept["weights"] == 4 * kept["parameters"] >= 4 * 494_032_768 / 16
    assert list(tmp_path.iterdir()) == []


def test_for_people() -> None:
    done = dry_run("miniature", "--dry-run", "--world-size", 4)
    assert done.returncode == 0, done.stderr
    for text in ("mesh: dp_shard 4", "weights", "optimizer", "gathered by FSDP"):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("7b", "--world-size", 8), "--world-size 8 is of --dry-run"),
        (
            ("7b", "--dry-run", "--world-size", 8, "mesh.tp=3"),
            "tp 3 is 6 ranks, but the world has 8",
        ),
    ],
)
def test_what_cannot_be_is_exit_2(arguments: tuple[object, ...], says: str) -> None:
    done = dry_run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
