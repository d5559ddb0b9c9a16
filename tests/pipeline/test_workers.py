"""Workers: results, errors, kills and signals, in this process and in others."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import worker_tasks

from qwen2.common.errors import UserError
from qwen2.pipeline.workers import Workers, open_workers, stopping, total


def is_running(pid: int) -> bool:
    """Zombies are not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def children() -> set[int | None]:
    return {child.pid for child in multiprocessing.active_children()}


@pytest.fixture(scope="module")
def pool() -> Iterator[Workers]:
    """Two processes that the tests which do them no harm share."""
    before = children()
    with open_workers(2) as workers:
        yield workers
    assert children() == before


def test_results_of_all_tasks_come(pool: Workers) -> None:
    with open_workers(1) as alone:
        assert list(alone.map(worker_tasks.square, range(5))) == [0, 1, 4, 9, 16]
    assert sorted(pool.map(worker_tasks.square, range(5))) == [0, 1, 4, 9, 16]
    assert list(pool.map(worker_tasks.square, [])) == []


def test_a_user_error_arrives_as_it_was(pool: Workers) -> None:
    with pytest.raises(UserError, match=r"^3: not this one$"):
        list(pool.map(worker_tasks.refuse, range(1000)))
    assert sorted(pool.map(worker_tasks.square, range(3))) == [0, 1, 4], "and the processes go on"


def test_closed_early_begins_no_more(pool: Workers, tmp_path: Path) -> None:
    done = pool.map(partial(worker_tasks.note, tmp_path), range(1000))
    next(done)
    done.close()  # type: ignore[attr-defined]
    assert sorted(pool.map(worker_tasks.square, range(3))) == [0, 1, 4]
    assert len(list(tmp_path.iterdir())) <= 3, "the first, and what ran beside it"


def test_a_killed_process_is_one_line_and_takes_the_others_along(tmp_path: Path) -> None:
    start, before = time.monotonic(), children()
    with (
        pytest.raises(UserError, match=r"^a worker process was killed \(out of memory\?\); run"),
        open_workers(2) as workers,
    ):
        list(workers.map(partial(worker_tasks.die_or_stay, tmp_path), ["other", "dies"]))
    assert time.monotonic() - start < worker_tasks.PATIENCE / 2
    assert children() == before
    assert not (tmp_path / "other.ended").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_begun_end_early(number: signal.Signals, tmp_path: Path) -> None:
    before = children()
    with open_workers(2) as workers:
        found = []
        for name in workers.map(
            partial(worker_tasks.signal_or_stay, tmp_path, number), ["a", "b", "c"]
        ):
            found.append(name)
        assert workers.stopped() == number.name
    assert sorted(found) == ["a", "b"], "c is not begun"
    assert [path.read_text() for path in tmp_path.glob("*.ended")] == ["asked", "asked"]
    assert children() == before


def test_a_signal_is_seen_in_this_process_too(tmp_path: Path) -> None:
    def work(name: str) -> str:
        if name == "b":
            os.kill(os.getpid(), signal.SIGTERM)
            assert stopping()
        return name

    with open_workers(1) as workers:
        assert list(workers.map(work, ["a", "b", "c"])) == ["a", "b"]
    assert not stopping()


def program(folder: Path, work: str) -> subprocess.Popen[str]:
    """A run of its own session, so that a signal to its group is what Ctrl-C is."""
    (folder / "program.py").write_text(
        "import sys\n"
        "from functools import partial\n"
        "from pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from worker_tasks import {work}\n"
        "from qwen2.pipeline.workers import open_workers\n"
        "if __name__ == '__main__':\n"
        "    with open_workers(2) as workers:\n"
        f"        done = list(workers.map(partial({work}, Path(sys.argv[1])), 'abc'))\n"
        "    print(workers.stopped(), *sorted(done))\n"
    )
    return subprocess.Popen(
        [sys.executable, folder / "program.py", folder],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def test_ctrl_c_before_the_processes_are_ready_is_only_a_stop(tmp_path: Path) -> None:
    """It goes to all of the group, also to a process that is still importing."""
    run = program(tmp_path, "stay")
    pids = worker_tasks.await_files(tmp_path, "a.begun", 1) and [
        int((tmp_path / "a.begun").read_text() or 0)
    ]
    os.killpg(run.pid, signal.SIGINT)
    out, err = run.communicate(timeout=worker_tasks.PATIENCE)
    assert (run.returncode, err) == (0, "")
    assert out.split()[:2] == ["SIGINT", "a"]
    assert not any(map(is_running, pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_the_second_signal_ends_all_at_once(number: signal.Signals, tmp_path: Path) -> None:
    run = program(tmp_path, "sleep")
    worker_tasks.await_files(tmp_path, "*.begun", 2)
    time.sleep(0.1)
    pids = [int(path.read_text()) for path in tmp_path.glob("*.begun")]
    start = time.monotonic()
    if number != signal.SIGKILL:
        os.killpg(run.pid, number)
        time.sleep(0.2)
        assert run.poll() is None
    os.kill(run.pid, number)
    run.communicate(timeout=worker_tasks.PATIENCE)
    assert run.returncode == -number
    while any(map(is_running, pids)):
        assert time.monotonic() - start < worker_tasks.PATIENCE / 2
        time.sleep(0.01)


def test_totals_are_by_name() -> None:
    assert total(iter([{"a": 1}, {"a": 2, "b": 5}, {}])) == {"a": 3, "b": 5}


@pytest.mark.slow
def test_ray_gives_the_same_results_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ.get("PYTHONPATH", ""), here]))
    try:
        with open_workers(1, "ray") as workers:
            assert sorted(workers.map(worker_tasks.square, range(4))) == [0, 1, 4, 9]
            with pytest.raises(UserError, match=r"^3: not this one$"):
                list(workers.map(worker_tasks.refuse, range(5)))
    finally:
        ray.shutdown()
