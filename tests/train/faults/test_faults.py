"""A save that is killed, or whose disk fails, at every call to the file system, one after another.

The next start finds the last whole checkpoint or the new one, and goes on to the same weights as a
run that nothing happened to.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import victim

from qwen2.train.checkpointer import newest_checkpoint

HERE = Path(__file__).parent
KILL = 0
Order = Callable[..., list[dict[str, Any]]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Order]:
    """Has ranks train in a folder, with a fault; what became of each."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None or not sys.platform.startswith("linux"):
        pytest.skip("faults are injected by a library: they need a C compiler, and Linux")
    place = tmp_path_factory.mktemp("faults")
    library = place / "faults.so"
    options = ["-shared", "-fPIC", "-O1", str(HERE / "faults.c"), "-o", str(library), "-ldl"]
    subprocess.run([compiler, *options], check=True)
    process = subprocess.Popen(
        [sys.executable, str(HERE / "victim.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"LD_PRELOAD": str(library), "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def send(
        folder: Path,
        steps: int,
        at: int = 0,
        error: int = KILL,
        asynchronous: bool = False,
        ranks: int = 1,
        rank: int = 0,
    ) -> list[dict[str, Any]]:
        for name in (*(f"answer-{i}" for i in range(2)), "store"):
            (place / name).unlink(missing_ok=True)
        values = {"folder": str(folder), "place": str(place), "steps": steps, "at": at}
        values |= {"error": error, "asynchronous": asynchronous, "ranks": ranks, "rank": rank}
        process.stdin.write(json.dumps(values) + "\n")
        process.stdin.flush()
        answer: list[dict[str, Any]] = json.loads(process.stdout.readline())
        if {"killed": True} not in answer:  # of which the others' connections break
            assert not any("crashed" in told for told in answer), answer
        return answer

    yield send
    process.stdin.close()
    assert process.wait(60) == 0


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder in memory, where there is one: a thousand flushes take their time on a disk."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        yield Path(name)


@pytest.fixture
def reference(place: Path) -> dict[str, torch.Tensor]:
    """The weights after six steps that nothing happened to."""
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    weights = victim.train(place / "reference", 6)
    torch.set_num_threads(threads)
    torch.set_rng_state(random)
    return weights


def goes_on(folder: Path, reference: dict[str, torch.Tensor]) -> None:
    """To the same weights, and nothing but the newest checkpoint is left."""
    weights = victim.train(folder, 6)
    for name, weight in reference.items():
        assert torch.equal(weights[name], weight), name
    assert [path.name for path in folder.iterdir()] == ["step-00000006"]


Begin = Callable[[], Path]


@pytest.fixture
def begin(place: Path) -> Begin:
    """Makes a folder with a whole checkpoint of the second step."""
    victim.train(place / "base", 2)
    folder = place / "run"

    def make() -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(place / "base", folder)
        return folder

    return make


@pytest.mark.parametrize("asynchronous", [False, True])
def test_killed_at_any_call(
    asynchronous: bool,
    order: Order,
    begin: Begin,
    reference: dict[str, torch.Tensor],
) -> None:
    """The save of the fourth step, with all that removes the checkpoint of the second."""
    how = {"steps": 5, "asynchronous": asynchronous}
    (told,) = order(begin(), **how)
    calls = told["calls"]
    assert told["said"] is None
    assert set(calls) == set("mowsrud")  # mkdir, open, write, fsync, rename, unlink, rmdir
    found = []
    for at in range(1, len(calls) + 1):
        folder = begin()
        (told,) = order(folder, at=at, **how)
        assert told == {"killed": True}, (at, calls)
        newest = newest_checkpoint(folder)
        assert newest is not None
        found.append(newest.name)
        goes_on(folder, reference)
    renamed = calls.index("r", calls.rindex("m")) + 1  # the call that is killed is not made
    assert set(found[:renamed]) == {"step-00000002"}
    assert found == sorted(found)
    assert found[-1] == "step-00000004"


def test_the_first_save_killed_at_any_call(
    order: Order, place: Path, reference: dict[str, torch.Tensor]
) -> None:
    (told,) = order(place / "counted", 2)
    for at in range(1, len(told["calls"]) + 1):
        folder = place / f"run-{at}"
        assert order(folder, 2, at) == [{"killed": True}]
        goes_on(folder, reference)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EIO, "cannot be written: Input/output error"),
    ],
)
def test_failing_at_any_call(
    error: int,
    reason: str,
    asynchronous: bool,
    order: Order,
    begin: Begin,
    reference: dict[str, torch.Tensor],
) -> None:
    """The run ends with one line that names the last good checkpoint, which is there."""
    how = {"steps": 5, "asynchronous": asynchronous, "error": error}
    (told,) = order(begin(), **how)
    calls, harmless = told["calls"], 0
    for at in range(1, len(calls) + 1):
        folder = begin()
        (told,) = order(folder, at=at, **how)
        newest = newest_checkpoint(folder)
        assert newest is not None
        if told["said"] is None:  # it would have made a folder that is there
            assert calls[at - 1] == "m"
            assert newest.name == "step-00000004"
            harmless += 1
        else:
            assert reason in told["said"]
            assert f"the last good one is {newest};" in told["said"]
        goes_on(folder, reference)
    assert harmless <= (0 if error == errno.ENOSPC else 3)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [KILL, errno.ENOSPC])
def test_one_of_two_ranks(
    rank: int,
    error: int,
    order: Order,
    begin: Begin,
    reference: dict[str, torch.Tensor],
) -> None:
    """Is killed, and the other with it; or its disk is full, and both say so."""
    how = {"steps": 5, "asynchronous": True, "ranks": 2, "rank": rank, "error": error}
    calls = order(begin(), **how)[rank]["calls"]
    for at in range(1, len(calls) + 1):
        folder = begin()
        told = order(folder, at=at, **how)
        newest = newest_checkpoint(folder)
        assert newest is not None
        if error == KILL:
            assert told[rank] == {"killed": True}, (at, calls)
            assert told[1 - rank].keys() <= {"killed", "crashed"}
        else:
            assert all(f"the last good one is {newest};" in each["said"] for each in told)
        goes_on(folder, reference)
