"""`qwen2 plan` prints a plan for people or as JSON, or says in one line why there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


def plan(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "qwen2.cli", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_plan_prints_one_object() -> None:
    done = plan("0.5b", "--devices", 4, "--memory", 40, "accumulation=64", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    best = found["plan"]
    assert found["step_tokens"] == 4096 * 4 * 64
    assert best["fits"]
    assert best["memory"]["total"] == sum(
        size for part, size in best["memory"].items() if part != "total"
    )
    tokens = best["tokens_per_second"] * best["step_seconds"]["total"]
    assert tokens == pytest.approx(4096 * 4 * 64)
    assert len(found["others"]) == 4


def test_plan_for_people() -> None:
    done = plan("7b", "--devices", 32)
    assert done.returncode == 0, done.stderr
    for text in ("mesh: dp_shard 32", "tokens/s", "MFU", "days", "the fastest that fit"):
        assert text in done.stdout


def test_the_phase_that_needs_most_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "phased.yaml"
    values = {
        "model": {"published": "0.5b"}, "data": "none", "tokenizer": "none", "out": "none",
        "context": 2048, "rows": 4, "optimizer": {"lr": 1e-3},
        "phases": [{"steps": 90}, {"steps": 10, "context": 8192}],
    }  # fmt: skip
    recipe.write_text(json.dumps(values))
    done = plan(recipe, "--devices", 2)
    assert done.returncode == 0, done.stderr
    assert "phase 2 of 2 needs most memory" in done.stdout
    assert "rows of 8,192 tokens" in done.stdout
    assert json.loads(plan(recipe, "--devices", 2, "--json").stdout)["plan"]["phase"] == 1


def test_nothing_that_fits_is_exit_2() -> None:
    done = plan("72b", "--devices", 8)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("qwen2: nothing fits 8 x 80 GB")
    assert len(done.stderr.splitlines()) == 1
