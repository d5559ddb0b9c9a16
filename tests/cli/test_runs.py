"""The scripts of runs/: what they start, in which order; and one machine's in miniature."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qwen2.common.config import read_values
from qwen2.common.recipes import find_recipe
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.shards import write_shards
from qwen2.train.plan import read_job
from qwen2.train.plan_search import own_plan
from qwen2.train.plan_time import Cluster

RUNS = Path(__file__).parents[2] / "runs"
HOSTS = {"NODES": "4", "NODE_RANK": "0", "HEAD": "first:29500"}
SLURM = {"SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "first,more", "SLURM_JOB_ID": "7"}
SCRIPTS = {
    "one_machine.sh": ({}, ["--standalone", "--nproc-per-node", "8"]),
    "cluster.sh": (HOSTS, ["--nnodes", "4", "--nproc-per-node", "8", "--rdzv-backend", "c10d"]),
    "slurm.sbatch": (SLURM, ["--nnodes", "4", "--nproc-per-node", "8", "--rdzv-backend", "c10d"]),
}
STUB = """#!/usr/bin/env bash
case $(basename "$0") in
  srun) exec "$@" ;;
  scontrol) echo first; echo more ;;
  *) printf '%q ' "$(basename "$0")" "$@" >> "$STARTED"; echo >> "$STARTED" ;;
esac
"""


def started(tmp_path: Path, script: str, *arguments: str) -> list[list[str]]:
    """The commands that a script starts, where nothing is done."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("torchrun", "python", "srun", "scontrol"):
        (tools / name).write_text(STUB)
        (tools / name).chmod(0o755)
    environment = {
        "PATH": f"{tools}:{os.environ['PATH']}", "STARTED": str(tmp_path / "started"),
        "SLURM_SUBMIT_DIR": str(RUNS.parent), **SCRIPTS[script][0],
    }  # fmt: skip
    subprocess.run(["bash", RUNS / script, *arguments], env=environment, cwd=tmp_path, check=True)
    return [shlex.split(line) for line in (tmp_path / "started").read_text().splitlines()]


def recipe_of(command: list[str]) -> tuple[str, list[str]]:
    """What a command trains: the recipe and its overrides."""
    assert command[0] == "torchrun"
    at = command.index("train")
    assert command[at - 2 : at] == ["-m", "qwen2.cli"]
    return command[at + 1], command[at + 2 :]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mixture_comes_after_its_dense_model(tmp_path: Path, script: str) -> None:
    commands = started(tmp_path, script, "57b-a14b")
    trained = [recipe_of(command) for command in commands if command[0] == "torchrun"]
    launch = [command[: command.index("-m")] for command in commands if command[0] == "torchrun"]
    assert all(words[1 : 1 + len(SCRIPTS[script][1])] == SCRIPTS[script][1] for words in launch)
    assert [name for name, _ in trained] == [
        "7b.yaml", "long_context.yaml", "57b-a14b.yaml", "long_context.yaml"
    ]  # fmt: skip
    upcycle = "python -m qwen2.cli upcycle out/7b/model out/57b-a14b-upcycled"
    assert commands[2] == upcycle.split()
    assert "init=out/7b/model" in trained[1][1]
    assert "init=out/57b-a14b/model" in trained[3][1]


@pytest.mark.parametrize(
    ("script", "devices", "size"),
    [
        *(("one_machine.sh", 8, size) for size in ("0.5b", "1.5b", "7b")),
        *(("cluster.sh", 32, size) for size in ("0.5b", "1.5b", "7b", "57b-a14b", "72b")),
    ],
)
def test_what_is_started_fits(tmp_path: Path, script: str, devices: int, size: str) -> None:
    for command in started(tmp_path, script, size):
        if command[0] != "torchrun":
            continue
        name, overrides = recipe_of(command)
        path = find_recipe(name)
        of = next((x.split("/")[1] for x in overrides if x.startswith("init=")), name[:-5])
        promised = [] if "init" not in str(overrides) + path.read_text() else [
            f"model.published={of}"
        ]  # fmt: skip
        values = read_values(path, [*overrides, *promised])
        values.setdefault("mesh", {})
        plan = own_plan(read_job(values, name), Cluster(devices, 80e9))
        assert plan.work.recompute == "full"
        assert plan.fits


def test_a_size_that_is_none_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", RUNS / "one_machine.sh", "8b"], cwd=tmp_path, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "8b: choose one of" in done.stderr


@pytest.mark.slow
def test_one_machine_in_miniature(tmp_path: Path) -> None:
    ranks = {bytes([i]): i for i in range(256)}
    tokenizer = Tokenizer.from_ranks(ranks, {"<|endoftext|>": 256, "<|im_end|>": 257})
    tokenizer.save(tmp_path / "out/tokenizer")
    text = [("prose", tokenizer.encode("To see a world in a grain of sand. " * n)) for n in (1, 9)]
    write_shards(tmp_path / "out/shards", text, vocab_size=258, end_of_text=256, tokenizer="bytes")
    shape = {
        "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    common = {
        "data": "out/shards", "tokenizer": "out/tokenizer", "rows": 2, "steps": 2,
        "optimizer": {"lr": 1e-3}, "dtype": "fp32", "threads": 1, "device": "cpu",
    }  # fmt: skip
    recipes = {
        "7b": {"model": shape, "out": "out/7b", "context": 32},
        "long_context": {"stage": "long_context", "context": 64},
    }
    (tmp_path / "mine").mkdir()
    for name, values in recipes.items():
        (tmp_path / f"mine/{name}.yaml").write_text(yaml.safe_dump(common | values))
    tools = Path(sys.executable).parent
    environment = os.environ | {
        "RANKS": "1", "RECIPES": "mine/", "PATH": f"{tools}:{os.environ['PATH']}",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", RUNS / "one_machine.sh", "7b"], env=environment, cwd=tmp_path,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name, context in (("7b", 32), ("7b-long", 64)):
        config = json.loads((tmp_path / f"out/{name}/model/config.json").read_text())
        assert config["max_position_embeddings"] == context
