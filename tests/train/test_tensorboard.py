"""Scalars for TensorBoard: those of the metrics, each step once whatever happened in between."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from qwen2.common.errors import UserError
from qwen2.tokens.loader import PackedLoader
from qwen2.train import tensorboard
from qwen2.train.loop import LoopSettings, Run
from qwen2.train.pretrain import PretrainRecipe, pretrain
from qwen2.train.step import Trainee
from qwen2.train.tensorboard import TensorBoard, scalars

needs_tensorboard = pytest.mark.skipif(
    find_spec("tensorboard") is None, reason="tensorboard is not installed: extra track"
)


class FakeWriter:
    """What SummaryWriter is asked for."""

    def __init__(self, folder: str, purge_step: int) -> None:
        self.folder, self.purge_step, self.closed = folder, purge_step, False
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written.append((name, value, step))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package."""
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = FakeWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: object())


def test_scalars_of_each_kind_of_line() -> None:
    line = {"step": 3, "loss": 2.0, "expert_share": [0.5, 0.2, 0.3], "dropped": 1}
    assert dict(scalars(line)) == {
        "train/loss": 2.0, "train/expert_share_most": 0.5, "train/expert_share_least": 0.2,
        "train/dropped": 1,
    }  # fmt: skip
    held_out = {"step": 3, "evaluation": {"code": 1.0, "long": {"de": 2.0}}}
    assert dict(scalars(held_out)) == {"held_out/code": 1.0, "held_out/long de": 2.0}
    assert dict(scalars({"step": 3, "skipped": "loss nan"})) == {"train/skipped": 1.0}


def test_lines_go_to_their_steps_and_later_ones_of_before_are_purged(
    fake: None, tmp_path: Path
) -> None:
    board = TensorBoard(tmp_path, step=6)
    board.write({"step": 6, "skipped": "loss nan"})
    board.write({"step": 7, "loss": 2.0})
    board.close("finished")
    writer = board._writer
    assert isinstance(writer, FakeWriter)
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path), 7, True)
    assert writer.written == [("train/skipped", 1.0, 7), ("train/loss", 2.0, 7)]


def test_without_the_package_it_is_told_how_to_get_it(
    recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorboard, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'qwen2\[track\]', or set tensorboard=false"):
        pretrain(PretrainRecipe.parse(recipe | {"tensorboard": True}))
    assert not Path(recipe["out"]).exists(), "told before anything is written"


def test_it_may_be_turned_on_when_a_run_resumes(fake: None, recipe: dict[str, Any]) -> None:
    recipe["steps"] = 1
    pretrain(PretrainRecipe.parse(recipe))
    more = {"tensorboard": True, "profile": {"step": 1}}
    assert pretrain(PretrainRecipe.parse(recipe | more)).finished


@needs_tensorboard
def test_the_real_one_has_each_step_once_after_a_resume(
    tmp_path: Path,
    new_trainee: Callable[..., Trainee],
    new_loader: Callable[..., PackedLoader],
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (4, 6):
        settings = LoopSettings(tensorboard=True, checkpoint_every=3, evaluate_every=2)
        run = Run(
            new_trainee(), new_loader(), settings, lambda _: 1e-3, tmp_path, "test", 1e9,
            lambda model: {"code": 1.5},
        )  # fmt: skip
        assert run.state.step == (0 if steps == 4 else 3)
        run.train(steps)
        if steps == 4:  # as after a kill: the newest checkpoint is that of step 3
            for file in (tmp_path / "checkpoints" / "step-00000004").iterdir():
                file.write_bytes(b"")
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("held_out/code")] == [2, 4, 6]
