"""A trace of chosen steps, readable and with the operators of training."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.tokens.loader import PackedLoader
from qwen2.train.loop import LoopSettings, Run
from qwen2.train.profiler import Profiler, ProfileSettings
from qwen2.train.step import Trainee

NewRun = Callable[..., Run]


@pytest.fixture
def new_run(
    tmp_path: Path, new_trainee: Callable[..., Trainee], new_loader: Callable[..., PackedLoader]
) -> NewRun:
    """Makes runs in one folder."""

    def make(**settings: Any) -> Run:
        chosen = LoopSettings.parse({"checkpoint_every": 2} | settings)
        return Run(new_trainee(), new_loader(), chosen, lambda _: 1e-3, tmp_path, "test", 1e9)

    return make


def operators(path: Path) -> list[str]:
    """Names of all operators in a trace, in their order."""
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("cat") == "cpu_op"]


def test_the_trace_has_the_operators_of_its_steps_alone(new_run: NewRun, tmp_path: Path) -> None:
    new_run(profile={"step": 2, "steps": 2}).train(5)
    names = operators(tmp_path / "trace-00000002.json.gz")
    for expected in ("aten::embedding", "aten::mm", "aten::silu", "aten::embedding_dense_backward"):
        assert expected in names
    steps = [name for name in names if name == "aten::embedding"]
    assert len(steps) == 2, "of two steps with one micro-batch each"
    table = (tmp_path / "trace-00000002.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU" in table
    assert sorted(path.name for path in tmp_path.glob("*trace*")) == [
        "trace-00000002.json.gz", "trace-00000002.txt",
    ]  # fmt: skip


def test_the_first_step_can_be_traced_and_a_run_that_ends_before_leaves_what_it_did(
    new_run: NewRun, tmp_path: Path
) -> None:
    new_run(profile={"step": 1, "steps": 9}).train(3)
    assert operators(tmp_path / "trace-00000001.json.gz").count("aten::embedding") == 3


def test_steps_that_do_not_come_are_said(
    new_run: NewRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new_run(profile={"step": 7}).train(2)
    assert "profile.step 7: this run does steps 1 to 2; no trace" in capsys.readouterr().err
    new_run(profile={"step": 2}).train(4)
    assert "profile.step 2: this run does steps 3 to 4; no trace" in capsys.readouterr().err
    assert not list(tmp_path.glob("trace*"))


def test_other_lines_do_not_count(tmp_path: Path) -> None:
    profiler = Profiler(ProfileSettings(step=2, steps=1), tmp_path, 0, 9, torch.device("cpu"))
    profiler.write({"step": 1, "skipped": "loss nan"})
    assert profiler._profile is None
    profiler.write({"step": 1, "loss": 1.0})
    assert profiler._profile is not None
    profiler.write({"step": 2, "evaluation": {}})
    assert profiler._profile is not None
    profiler.write({"step": 2, "loss": 1.0})
    assert profiler._profile is None


@pytest.mark.parametrize("profile", [{"step": 0}, {"steps": 101}, {"first": 1}])
def test_a_profile_that_cannot_be_is_refused(profile: dict[str, int]) -> None:
    with pytest.raises(UserError, match="profile"):
        LoopSettings.parse({"profile": profile})
