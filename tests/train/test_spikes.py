"""Loss spikes: what is one, and that a run goes back, leaves data out, and resumes all the same."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.tokens.loader import PackedLoader
from qwen2.tokens.packing import PackedBatch
from qwen2.train.curves import History
from qwen2.train.health import signs
from qwen2.train.loop import LoopSettings, Run
from qwen2.train.spikes import SpikeSettings
from qwen2.train.step import Trainee

NewTrainee = Callable[..., Trainee]
NewLoader = Callable[..., PackedLoader]
SPIKE = SpikeSettings(sigma=4, window=8)


class Noisy:
    """A loader of which some batches, by number, have targets that nothing can predict."""

    def __init__(self, inner: PackedLoader, noisy: set[int]) -> None:
        self.inner, self.noisy = inner, noisy
        self.read: list[int] = []

    def __next__(self) -> PackedBatch:
        number = self.inner.row // self.inner.rows
        self.read.append(number)
        batch = next(self.inner)
        if number not in self.noisy:
            return batch
        return replace(batch, targets=(batch.targets * 7 + 31) % 61)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def run(out: Path, trainee: Trainee, loader: Any, spike: SpikeSettings | None, steps: int) -> Run:
    settings = LoopSettings(checkpoint_every=20, spike=spike)
    made = Run(trainee, loader, settings, lambda _: 5e-3, out, "test", 1e9)
    made.train(steps)
    return made


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_spike_is_far_above_the_last_losses() -> None:
    before = [3.0, 3.1, 2.9, 3.0]
    assert SPIKE.describe(3.2, before) is None
    assert "loss 4.0000, 3.0000 ± 0.0707 before" in (SPIKE.describe(4.0, before) or "")
    assert SPIKE.describe(40.0, before[:3]) is None, "too few to judge by"
    assert SPIKE.describe(4.0, [90.0, *[3.0, 3.1, 2.9, 3.0] * 2]), "of the window alone"
    assert SPIKE.describe(1.0, before) is None


@pytest.mark.parametrize("skip", [0, 3])
def test_after_a_spike_the_run_is_the_one_without_those_data(
    skip: int, tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    noisy = Noisy(new_loader(), {45})
    went = new_trainee()
    back = run(tmp_path / "back", went, noisy, SPIKE.model_copy(update={"skip": skip}), 60)
    assert back.state.step == 60
    assert noisy.read[:46] == list(range(46)), "up to the spike, of step 46, and back to step 40"
    assert noisy.read[46:] == list(range(40, 46 + skip + 20)), "6 and some are thrown away"
    found = [line for line in lines(tmp_path / "back") if "rolled_back" in line]
    assert [line["step"] for line in found] == [40]
    assert "at step 46" in found[0]["rolled_back"]

    class Without(Noisy):
        def __next__(self) -> PackedBatch:
            if self.inner.row == 40 * self.inner.rows:
                self.inner.row = (46 + skip) * self.inner.rows
            return super().__next__()

    straight = new_trainee()
    run(tmp_path / "straight", straight, Without(new_loader(), set()), None, 60)
    for name, master in went.weights.masters.items():
        torch.testing.assert_close(master, straight.weights.masters[name], rtol=0, atol=0)


def test_killed_after_going_back_it_goes_back_again(
    tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    straight, killed = new_trainee(), new_trainee()
    run(tmp_path / "straight", straight, Noisy(new_loader(), {45}), SPIKE, 60)

    class Killed(Noisy):
        def __next__(self) -> PackedBatch:
            if self.inner.row == 50 * self.inner.rows:
                raise KeyboardInterrupt
            return super().__next__()

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", killed, Killed(new_loader(), {45}), SPIKE, 60)
    again = new_trainee()
    run(tmp_path / "killed", again, Noisy(new_loader(), {45}), SPIKE, 60)
    for name, master in again.weights.masters.items():
        torch.testing.assert_close(master, straight.weights.masters[name], rtol=0, atol=0)
    machine = {"tokens_per_s", "mfu", "memory_gb"}
    assert [
        {k: v for k, v in line.items() if k not in machine} for line in lines(tmp_path / "killed")
    ] == [
        {k: v for k, v in line.items() if k not in machine} for line in lines(tmp_path / "straight")
    ]


def test_spike_after_spike_from_one_checkpoint_ends_the_run(
    tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    loader = Noisy(new_loader(), set(range(45, 100)))
    with pytest.raises(UserError, match=r"after 3 returns to step-00000040; lower optimizer\.lr"):
        run(tmp_path, new_trainee(), loader, SPIKE, 60)


def test_before_the_first_checkpoint_there_is_no_way_back(
    tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    done = run(tmp_path, new_trainee(), Noisy(new_loader(), {15}), SPIKE, 19)
    assert done.state.step == 19
    assert not any("rolled_back" in line for line in lines(tmp_path))


def test_the_page_tells_of_it(
    tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    run(tmp_path, new_trainee(), Noisy(new_loader(), {45}), SPIKE, 60)
    history = History(60)
    history.read(tmp_path / "metrics.jsonl")
    assert any("went back once after a loss spike, last to step 40" in x for x in signs(history))
    assert "went back once" in (tmp_path / "run.html").read_text()
