"""Training checkpoints: whole or not at all, the newest good one used, full disks survived."""

from __future__ import annotations

import errno
import gc
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.tokens.loader import PackedLoader
from qwen2.train import checkpoints
from qwen2.train.checkpoints import (
    RunState,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from qwen2.train.loop import LoopSettings
from qwen2.train.metrics import MetricsFile
from qwen2.train.optimizers import AdamWConfig, MuonConfig
from qwen2.train.step import Trainee, train_step


@pytest.fixture
def trainee(
    new_trainee: Callable[..., Trainee], new_loader: Callable[..., PackedLoader]
) -> Trainee:
    """A trainee whose optimizer has moments."""
    trainee = new_trainee(torch.bfloat16)
    train_step(trainee, [next(new_loader())], lr=1e-2, clip=1.0)
    return trainee


def save(folder: Path, trainee: Trainee, step: int, keep: int = 9) -> Path:
    masters, optimizer = trainee.weights.masters, trainee.optimizer
    state = RunState(step=step, tokens=7, skipped=2, metrics_bytes=11)
    return save_checkpoint(folder, state, masters, optimizer, {"row": 5}, LoopSettings(), keep)


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
    assert newest_checkpoint(tmp_path) == paths[1]
    said = capsys.readouterr().err
    assert f"{flipped}: its sha256" in said
    assert f"{gone}: missing" in said
    assert not leftover.exists()
    # Going on from there, the damaged ones neither stay nor push out what is whole.
    save(tmp_path, trainee, 3, keep=2)
    assert newest_checkpoint(tmp_path) == paths[2]
    assert sorted(tmp_path.iterdir()) == paths[1:3]


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


def test_no_room_keeps_the_last_good_one(
    tmp_path: Path, trainee: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = save(tmp_path, trainee, 1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
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


def test_a_full_disk_keeps_the_last_good_one(little_disk: Path, trainee: Trainee) -> None:
    folder = little_disk / "checkpoints"
    good = save(folder, trainee, 1)
    size = sum(file.stat().st_size for file in good.rglob("*"))
    (little_disk / "ballast").write_bytes(bytes(shutil.disk_usage(little_disk).free - size // 2))
    with pytest.raises(UserError, match=r"disk is full.*the last good one is .*step-00000001"):
        save(folder, trainee, 2)
    assert [p.name for p in folder.iterdir()] == [good.name]
    assert newest_checkpoint(folder) == good
    metrics = MetricsFile(little_disk / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics.jsonl: the disk is full"):
        metrics.write({"line": "x" * size})
