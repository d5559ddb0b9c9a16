"""Whatever has its final name is complete; whatever is damaged is named."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qwen2.common import files
from qwen2.common.errors import UserError
from qwen2.common.files import (
    durable_folder,
    durable_write,
    read_text,
    remove_leftovers,
    verify_folder,
)


def fill(folder: Path) -> None:
    (folder / "a.txt").write_text("alpha")
    (folder / "deep").mkdir()
    (folder / "deep" / "b.bin").write_bytes(bytes(1000))


def test_files_of_other_processes_are_taken_at_their_word_and_must_be_there(tmp_path: Path) -> None:
    known = {"theirs": {"bytes": 1, "sha256": "as they said"}}
    with durable_folder(tmp_path / "out", known=known) as partial:
        (partial / "theirs").write_text("b")
        (partial / "ours").write_text("a")
    assert (
        verify_folder(tmp_path / "out")
        == f"{tmp_path}/out/theirs: its sha256 is not the manifest's"
    )
    with (
        pytest.raises(UserError, match="wrote theirs, which is not there"),
        durable_folder(tmp_path / "other", known=known) as partial,
    ):
        (partial / "ours").write_text("a")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_shares_of_a_folder_are_all_of_it(tmp_path: Path) -> None:
    with durable_folder(tmp_path / "out") as partial:
        for number in range(5):
            (partial / str(number)).write_text("x" * number)
    for number in range(5):
        path = tmp_path / "out" / str(number)
        path.write_text("y" * (number + 1))
        found = [verify_folder(tmp_path / "out", (share, 3)) for share in range(3)]
        assert sum(problem is not None for problem in found) == 1
        path.write_text("x" * number)


def test_a_folder_appears_whole_with_its_manifest(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with durable_folder(target) as partial:
        fill(partial)
        assert not target.exists()
    assert verify_folder(target) is None
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_block_that_fails_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def work() -> None:
        with durable_folder(tmp_path / "out") as partial:
            fill(partial)
            raise error

    with pytest.raises(error):
        work()
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_is_kept_unless_replacing_is_asked_for(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with durable_folder(target) as partial:
        (partial / "old").write_text("old")
    with pytest.raises(UserError, match="exists already"), durable_folder(target):
        pass
    with durable_folder(target, overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert not (target / "old").exists()
    assert (target / "new").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_replacement_that_fails_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with durable_folder(target) as partial:
        (partial / "old").write_text("old")

    def work() -> None:
        with durable_folder(target, overwrite=True) as partial:
            (partial / "new").write_text("new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        work()
    assert verify_folder(target) is None
    assert (target / "old").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "a.txt").write_text("alphb"), "a.txt: its sha256"),
        (lambda folder: (folder / "a.txt").write_text("alph"), "a.txt: 4 bytes, 5 expected"),
        (lambda folder: (folder / "deep" / "b.bin").unlink(), "b.bin: missing"),
        (lambda folder: (folder / "manifest.json").unlink(), "no manifest.json"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json: not readable"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    with durable_folder(tmp_path / "out") as partial:
        fill(partial)
    damage(tmp_path / "out")  # type: ignore[operator]
    assert message in (verify_folder(tmp_path / "out") or "")


def test_a_full_disk_is_said_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    durable_write(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match=r"file: the disk is full"):
        durable_write(path, b"new")
    with (
        pytest.raises(UserError, match="out: the disk is full"),
        durable_folder(tmp_path / "out") as partial,
    ):
        fill(partial)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_leftovers_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.123.partial").mkdir()
    (tmp_path / ".file.123.partial").write_text("half")
    (tmp_path / ".kept.123.retired").mkdir()  # killed between the two renames
    (tmp_path / ".done.123.retired").mkdir()
    (tmp_path / "done").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "kept"]


def test_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("été".encode("latin-1"))
    with pytest.raises(UserError, match="latin: not UTF-8 at byte 0"):
        read_text(tmp_path / "latin")
    with pytest.raises(UserError, match="none: No such file"):
        read_text(tmp_path / "none")
