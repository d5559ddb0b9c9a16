"""`qwen2 train` under torchrun: runs of several processes, and of two hosts, that may lose one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qwen2.model.hub import load_model
from qwen2.train.curves import flatten
from qwen2.train.pretrain import PretrainRecipe, pretrain

pytestmark = pytest.mark.slow

SECONDS = 400  # on a busy machine
MACHINE = {"tokens_per_s", "mfu", "memory_gb"}


@pytest.fixture
def shared(recipe: dict[str, Any], data: Path) -> dict[str, Any]:
    """A recipe whose steps two ranks can share, with held-out text."""
    return recipe | {
        "dtype": "fp32",
        "accumulation": 2,
        "held_out": str(data / "shards"),
        "evaluate_every": 4,
    }


def torchrun(
    recipe: dict[str, Any],
    folder: Path,
    *options: str,
    before: tuple[str, ...] = (),
    **environ: str,
) -> subprocess.Popen[str]:
    """`qwen2 train` on `recipe` under torchrun; `before` is put before the command."""
    path = folder / f"{Path(recipe['out']).name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    command = [*before, sys.executable, "-m", "torch.distributed.run", *options]
    return subprocess.Popen(
        [*command, "-m", "qwen2.cli", "train", str(path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environ,
    )


def here(ranks: int) -> tuple[str, ...]:
    """Options for so many ranks on this host."""
    return ("--standalone", "--nproc-per-node", str(ranks))


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a run prints when it has ended well."""
    printed, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, said
    result: dict[str, Any] = json.loads(printed)  # of the first rank alone
    return result


def lines(out: Path) -> list[dict[str, Any]]:
    found = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in MACHINE} for line in found]


def assert_same_run(out: Path, other: Path) -> None:
    """The metrics of both, up to the order of sums."""
    found, expected = lines(out), lines(other)
    assert len(found) == len(expected)
    for line, twin in zip(found, expected, strict=True):
        assert flatten(line) == pytest.approx(flatten(twin), rel=1e-5)


def wait_for_steps(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def rank_process(agent: int, rank: int) -> int:
    """The process of a rank of torchrun's process `agent`."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            said = (folder / "environ").read_bytes().split(b"\0")
            if parent == agent and f"RANK={rank}".encode() in said:
                return int(folder.name)
    raise AssertionError(f"no rank {rank} of {agent}")


def test_two_ranks_train_the_model_that_one_process_does(
    shared: dict[str, Any], tmp_path: Path
) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    alone = pretrain(PretrainRecipe.parse(shared | {"out": str(one)}))
    result = finish(torchrun(shared | {"out": str(two)}, tmp_path, *here(2)))
    assert result["finished"]
    assert result["tokens"] == alone.tokens
    assert_same_run(two, one)
    assert alone.model is not None
    expected = load_model(alone.model).state_dict()
    for name, tensor in load_model(result["model"]).state_dict().items():
        # A hundredth of an update: Adam's are as large where gradients are nearly nothing.
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)
    # One process goes on from what both saved.
    for path in (two / "model", two / "checkpoints" / "step-00000008"):
        shutil.rmtree(path)
    again = pretrain(PretrainRecipe.parse(shared | {"out": str(two)}))
    assert again.finished
    assert_same_run(two, one)


def test_a_mesh_of_tensor_parallel_ranks_and_a_mixture(
    shared: dict[str, Any], tmp_path: Path
) -> None:
    shared["model"] |= {
        "moe": {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        }
    }
    two, one = tmp_path / "two", tmp_path / "one"
    pretrain(PretrainRecipe.parse(shared | {"out": str(one)}))
    finish(torchrun(shared | {"out": str(two), "mesh": {"tp": 2}}, tmp_path, *here(2)))
    for line, twin in zip(lines(two), lines(one), strict=True):
        for name in ("loss", "grad_norm", "balance_loss", "expert_entropy"):
            assert line.get(name, 0.0) == pytest.approx(twin.get(name, 0.0), rel=1e-4)


def test_a_mesh_that_does_not_fit_is_told_in_one_line(
    shared: dict[str, Any], tmp_path: Path
) -> None:
    process = torchrun(shared | {"mesh": {"tp": 4, "dp_shard": 1}}, tmp_path, *here(2))
    said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode != 0
    assert "mesh: tp 4 is 4 ranks, but the world has 2" in said
    assert "exitcode  : 2" in said
    assert not Path(shared["out"]).exists()


@pytest.fixture
def longer(shared: dict[str, Any]) -> dict[str, Any]:
    """A run that is long enough to be ended in its midst."""
    return shared | {"steps": 200, "checkpoint_every": 20, "evaluate_every": 400}


def test_a_rank_that_dies_ends_the_job_which_resumes(
    longer: dict[str, Any], tmp_path: Path
) -> None:
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    longer |= {"out": str(killed)}
    process = torchrun(longer, tmp_path, *here(2))
    wait_for_steps(killed, 50, process)
    os.kill(rank_process(process.pid, 1), signal.SIGKILL)
    said = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    root = said[said.index("Root Cause") :]
    assert "Signal 9 (SIGKILL)" in root
    assert "rank      : 1" in root
    assert len(lines(killed)) < 200
    # The same command goes on, and with --max-restarts torchrun gives it again by itself.
    process = torchrun(longer, tmp_path, *here(2), "--max-restarts", "1")
    wait_for_steps(killed, 110, process)
    os.kill(rank_process(process.pid, 0), signal.SIGKILL)
    assert finish(process)["finished"]
    finish(torchrun(longer | {"out": str(straight)}, tmp_path, *here(2)))
    assert lines(killed) == lines(straight), "bit for bit"


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_saves_them_all(
    asked: signal.Signals, longer: dict[str, Any], tmp_path: Path
) -> None:
    out = Path(longer["out"])
    process = torchrun(longer | {"steps": 100_000, "checkpoint_every": 100_000}, tmp_path, *here(2))
    wait_for_steps(out, 5, process)
    os.kill(rank_process(process.pid, 1), asked)
    result = finish(process)
    assert not result["finished"]
    assert Path(result["checkpoint"]) == out / "checkpoints" / f"step-{result['step']:08d}"
    assert len(lines(out)) == result["step"]


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two network namespaces, each with an address of its own, joined by a cable."""
    names = [f"qwen2-{os.getpid()}-{number}" for number in range(2)]

    def ip(*arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)

    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip(
                "-n",
                names[0],
                "link",
                "add",
                "cable",
                "type",
                "veth",
                "peer",
                "cable",
                "netns",
                names[1],
            )
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces can be made here: {error}")
        for number, name in enumerate(names):
            ip("-n", name, "address", "add", f"192.0.2.{number + 1}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_two_hosts_run_one_job(shared: dict[str, Any], hosts: list[str], tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    processes = [
        torchrun(
            shared | {"out": str(two), "mesh": {"dp_replicate": 2}},
            tmp_path,
            *("--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(number)),
            *("--master-addr", "192.0.2.1", "--master-port", "29400"),
            before=("ip", "netns", "exec", name),
            GLOO_SOCKET_IFNAME="cable",
        )
        for number, name in enumerate(hosts)
    ]
    first = finish(processes[0])
    printed, said = processes[1].communicate(timeout=SECONDS)
    assert (processes[1].returncode, printed) == (0, ""), said
    assert first["finished"]
    pretrain(PretrainRecipe.parse(shared | {"out": str(one)}))
    assert_same_run(two, one)
