"""Training checkpoints: whole or not at all, the newest good one used, full disks survived."""

from __future__ import annotations

import errno
import gc
import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.common.files import MANIFEST, verify_folder
from qwen2.model.hf_folder import read_config
from qwen2.tokens.loader import PackedLoader
from qwen2.train import checkpointer
from qwen2.train.checkpointer import Checkpointer, newest_checkpoint
from qwen2.train.checkpoints import RunState, load_checkpoint
from qwen2.train.loop import LoopSettings, Trainee, train_step
from qwen2.train.metrics import MetricsFile
from qwen2.train.optimizers import AdamWConfig, MuonConfig


@pytest.fixture
def trainee(
    new_trainee: Callable[..., Trainee], new_loader: Callable[..., PackedLoader]
) -> Trainee:
    """A trainee whose optimizer has moments."""
    trainee = new_trainee(torch.bfloat16)
    train_step(trainee, [next(new_loader())], lr=1e-2, clip=1.0)
    return trainee


def save_with(to: Checkpointer, trainee: Trainee, step: int) -> Path:
    """Save, perhaps not at once; the checkpoint's place."""
    state = RunState(step=step, tokens=7, skipped=2, metrics_bytes=11)
    to.save(
        state,
        trainee.weights.masters,
        trainee.optimizer,
        {"row": 5},
        LoopSettings(),
        trainee.model.config,
    )
    return to.folder / f"step-{step:08d}"


def save(folder: Path, trainee: Trainee, step: int, keep: int = 9) -> Path:
    return save_with(Checkpointer(folder, keep), trainee, step)


@pytest.mark.parametrize("optimizer", [AdamWConfig(lr=1e-2), MuonConfig(lr=1e-2)])
def test_round_trip(
    tmp_path: Path,
    optimizer: AdamWConfig | MuonConfig,
    new_trainee: Callable[..., Trainee],
    new_loader: Callable[..., PackedLoader],
) -> None:
    trainee, other = (new_trainee(torch.bfloat16, optimizer=optimizer) for _ in range(2))
    train_step(trainee, [next(new_loader())], lr=1e-2, clip=1.0)
    path = save(tmp_path, trainee, 3)
    drawn = torch.rand(4)
    state, loader = load_checkpoint(path, other.weights.masters, other.optimizer)
    assert state == RunState(step=3, tokens=7, skipped=2, metrics_bytes=11)
    assert loader == {"row": 5}
    torch.testing.assert_close(torch.rand(4), drawn, rtol=0, atol=0)
    for name, master in trainee.weights.masters.items():
        twin = other.weights.masters[name]
        assert torch.equal(master, twin)
        assert trainee.optimizer.state[master].keys() == other.optimizer.state[twin].keys() > set()
        for key, value in trainee.optimizer.state[master].items():
            assert torch.equal(value, other.optimizer.state[twin][key])
    kinds = {file.suffix for file in path.rglob("*") if file.is_file()}
    assert kinds == {".safetensors", ".json", ".yaml"}
    assert read_config(path) == trainee.model.config


def test_the_newest_good_one_is_used_and_bad_ones_are_named(
    tmp_path: Path, trainee: Trainee, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [save(tmp_path, trainee, step) for step in (1, 2, 3, 4)]
    assert newest_checkpoint(tmp_path) == paths[3]
    flipped = next((paths[3] / "weights").iterdir())
    data = bytearray(flipped.read_bytes())
    data[-1] ^= 1
    flipped.write_bytes(data)
    gone = next((paths[2] / "optimizer").iterdir())
    gone.unlink()
    leftover = tmp_path / ".step-00000009.123.partial"
    leftover.mkdir()
    assert newest_checkpoint(tmp_path) == paths[1]  # which changes nothing
    assert leftover.exists()
    again = Checkpointer(tmp_path, keep=2)
    assert again.newest() == again.last == paths[1]
    said = capsys.readouterr().err
    assert f"{flipped}: its sha256" in said
    assert f"{gone}: missing" in said
    assert not leftover.exists()
    # Going on from there, the damaged ones neither stay nor push out what is whole.
    save_with(again, trainee, 5)
    assert sorted(tmp_path.iterdir()) == [paths[1], tmp_path / "step-00000005"]


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(
    tmp_path: Path, trainee: Trainee
) -> None:
    whole, damaged = save(tmp_path, trainee, 1), save(tmp_path, trainee, 2)
    (damaged / "state.json").unlink()
    again = Checkpointer(tmp_path, keep=2)
    assert again.newest() == whole
    assert save_with(again, trainee, 2) == damaged == newest_checkpoint(tmp_path)
    assert sorted(tmp_path.iterdir()) == [whole, damaged]


def test_a_flipped_bit_in_any_file_is_found(tmp_path: Path, trainee: Trainee) -> None:
    """In its first, middle and last byte; in the manifest, which nothing vouches for, in each."""
    path = save(tmp_path, trainee, 1)
    files = [file for file in path.rglob("*") if file.is_file()]
    assert {file.parent.name for file in files} == {path.name, "weights", "optimizer", "rng"}
    for file in files:
        data = file.read_bytes()
        places = range(len(data)) if file.name == MANIFEST else (0, len(data) // 2, len(data) - 1)
        for place in places:
            changed = bytearray(data)
            changed[place] ^= 1
            file.write_bytes(changed)
            assert verify_folder(path) is not None, (file, place)
        file.write_bytes(data)
    assert verify_folder(path) is None


def test_no_checkpoint_and_no_whole_one_are_not_the_same(tmp_path: Path, trainee: Trainee) -> None:
    assert newest_checkpoint(tmp_path / "nothing") is None
    assert newest_checkpoint(tmp_path) is None
    (save(tmp_path, trainee, 1) / "state.json").write_text("{}")
    with pytest.raises(UserError, match="no checkpoint is whole; remove the folder"):
        newest_checkpoint(tmp_path)


def test_only_the_last_stay(tmp_path: Path, trainee: Trainee) -> None:
    for step in (1, 2, 30, 100):
        save(tmp_path, trainee, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000030", "step-00000100"]


def test_multiples_of_keep_every_stay_too(tmp_path: Path, trainee: Trainee) -> None:
    for step in (2, 4, 5, 6, 8, 9, 10, 11):
        save_with(Checkpointer(tmp_path, keep=1, keep_every=4), trainee, step)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:08d}" for step in (4, 8, 11)]


def files_of(folder: Path) -> dict[str, Any]:
    """The bytes of each file; of safetensors those of its tensors, and the header's values.

    The library writes keys of the header in an order that differs from call to call.
    """
    files: dict[str, Any] = {}
    for file in folder.rglob("*"):
        if file.is_file() and file.name != MANIFEST:
            data = file.read_bytes()
            files[file.relative_to(folder).as_posix()] = data
            if file.suffix == ".safetensors":
                end = 8 + int.from_bytes(data[:8], "little")
                header = json.loads(data[8:end])
                sharding = header.get("__metadata__", {}).pop("DCP_SHARDING_INFO", "{}")
                files[file.relative_to(folder).as_posix()] = (
                    header,
                    json.loads(sharding),
                    data[end:],
                )
    return files


def slow_writing(monkeypatch: pytest.MonkeyPatch, gate: threading.Event) -> None:
    """Let nothing be written before `gate` is opened."""
    write = checkpointer.write

    def wait_and_write(*arguments: Any) -> list[Path]:
        assert gate.wait(60)
        return write(*arguments)

    monkeypatch.setattr(checkpointer, "write", wait_and_write)


def test_asynchronous_saving_writes_the_same_files(
    tmp_path: Path,
    trainee: Trainee,
    new_loader: Callable[..., PackedLoader],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Those of the moment of the call, also when training goes on before anything is written."""
    loader, gate = new_loader(), threading.Event()
    later = Checkpointer(tmp_path / "later", keep=9, asynchronous=True)
    for step in (1, 2):  # the second into the memory of the first
        at_once = save(tmp_path / "at once", trainee, step)
        gate.clear()
        with monkeypatch.context() as patch:
            slow_writing(patch, gate)
            path = save_with(later, trainee, step)
            torch.rand(3)
            before = {name: p.detach().clone() for name, p in trainee.weights.masters.items()}
            assert train_step(trainee, [next(loader)], lr=1e-2, clip=1.0).applied
            for name, p in trainee.weights.masters.items():
                assert not torch.equal(before[name], p), name
            assert not path.exists()
            gate.set()
            later.wait()
        assert later.last == path
        assert files_of(path) == files_of(at_once)


def test_one_save_at_a_time_and_the_end_waits(
    tmp_path: Path, trainee: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun = threading.Event(), []
    slow_writing(monkeypatch, gate)
    with Checkpointer(tmp_path, keep=1, asynchronous=True) as checkpoints:
        first = save_with(checkpoints, trainee, 1)
        other = threading.Thread(target=lambda: begun.append(save_with(checkpoints, trainee, 2)))
        other.start()
        assert not begun
        assert not first.exists()
        gate.set()
        other.join()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
    assert checkpoints.last == begun[0] == newest_checkpoint(tmp_path)


def test_what_fails_in_the_thread_is_raised_by_the_next_call(
    tmp_path: Path,
    trainee: Trainee,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checkpoints = Checkpointer(tmp_path, keep=1, asynchronous=True)
    good = save_with(checkpoints, trainee, 1)
    checkpoints.wait()
    monkeypatch.setattr(checkpointer, "write", full)
    message = r"disk is full.*the last good one is .*step-00000001"
    save_with(checkpoints, trainee, 2)
    with pytest.raises(UserError, match=message):
        save_with(checkpoints, trainee, 3)
    save_with(checkpoints, trainee, 4)
    with pytest.raises(UserError, match=message):
        checkpoints.wait()
    checkpoints.wait()  # it has been told
    with pytest.raises(UserError, match=message), checkpoints:
        save_with(checkpoints, trainee, 5)
    with pytest.raises(ZeroDivisionError), checkpoints:
        assert 1 // len(save_with(checkpoints, trainee, 6).parts[:0])
    assert re.search(f"checkpoint not written: .*{message}", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == [good.name]
    assert checkpoints.last == good


def test_another_models_checkpoint_is_refused(
    tmp_path: Path, trainee: Trainee, new_trainee: Callable[..., Trainee]
) -> None:
    path = save(tmp_path, trainee, 1)
    wide = new_trainee(intermediate_size=32)
    with pytest.raises(UserError, match=r"gate_proj.weight is \[24, 16\], the model's \[32, 16\]"):
        load_checkpoint(path, wide.weights.masters, wide.optimizer)
    deep = new_trainee(num_hidden_layers=3)
    with pytest.raises(UserError, match=r"model\.layers\.2\..* is only in the model"):
        load_checkpoint(path, deep.weights.masters, deep.optimizer)


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_room_keeps_the_last_good_one(
    tmp_path: Path, trainee: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, trainee, 1)

    monkeypatch.setattr(checkpointer, "write", full)
    with pytest.raises(UserError, match=r"disk is full.*the last good one is .*step-00000001"):
        save(tmp_path, trainee, 2)
    assert [p.name for p in tmp_path.iterdir()] == [good.name]
    assert newest_checkpoint(tmp_path) == good


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small tmpfs here")
    yield place
    gc.collect()  # an error that was caught holds the file that was being written
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_keeps_the_last_good_one(
    asynchronous: bool, little_disk: Path, trainee: Trainee
) -> None:
    folder = little_disk / "checkpoints"
    good = save(folder, trainee, 1)
    size = sum(file.stat().st_size for file in good.rglob("*"))
    (little_disk / "ballast").write_bytes(bytes(shutil.disk_usage(little_disk).free - size // 2))
    message = r"disk is full.*the last good one is .*step-00000001"
    checkpoints = Checkpointer(folder, 9, None, asynchronous)
    with pytest.raises(UserError, match=message), checkpoints:
        save_with(checkpoints, trainee, 2)
    assert [p.name for p in folder.iterdir()] == [good.name]
    assert newest_checkpoint(folder) == good
    metrics = MetricsFile(little_disk / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl: the disk is full"):
        metrics.write({"line": "x" * size})
