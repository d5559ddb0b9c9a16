"""The step and the loop: accumulation, packing, resuming, skipping, stopping."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.model.decoder import Qwen2
from qwen2.tokens.loader import PackedLoader
from qwen2.tokens.packing import PackedBatch
from qwen2.train.loop import Evaluate, LoopSettings, Run
from qwen2.train.loss import IGNORE
from qwen2.train.optimizers import AdamWConfig, MuonConfig
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.step import Trainee, train_step

NewTrainee = Callable[..., Trainee]
NewLoader = Callable[..., PackedLoader]
CADENCE: dict[str, Any] = {"checkpoint_every": 100, "evaluate_every": 2}


MACHINE = {"tokens_per_s", "mfu", "memory_gb"}


def run(
    out: Path,
    trainee: Trainee,
    loader: Any,
    steps: int,
    evaluate: Evaluate | None = None,
    **settings_: Any,
) -> Run:
    """Train up to `steps` in `out`, with a learning rate that differs from step to step."""
    chosen = LoopSettings(**(CADENCE | settings_))
    lr = lambda step: 1e-2 / (1 + step)  # noqa: E731
    run_ = Run(trainee, loader, chosen, lr, out, "test", 1e9, evaluate)
    run_.train(steps)
    run_.metrics.close()
    return run_


def metrics(out: Path) -> list[dict[str, Any]]:
    """The metrics without what the machine says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in MACHINE} for x in lines]


def assert_same_weights(a: Trainee, b: Trainee, tolerance: float = 0.0) -> None:
    for name, master in a.weights.masters.items():
        twin = b.weights.masters[name]
        torch.testing.assert_close(
            master, twin, rtol=0, atol=tolerance, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_goes_down(
    dtype: torch.dtype, tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    trainee, loader = new_trainee(dtype), new_loader(rows=4)
    losses = [train_step(trainee, [next(loader)], 1e-2, clip=1.0).loss for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(61), abs=0.1)
    assert sum(losses[-5:]) / 5 < 1.5


def test_bf16_follows_the_curve_of_fp32(new_trainee: NewTrainee, new_loader: NewLoader) -> None:
    curves = []
    for dtype in (torch.float32, torch.bfloat16):
        trainee, loader = new_trainee(dtype), new_loader()
        curves.append([train_step(trainee, [next(loader)], 1e-3, 1.0).loss for _ in range(20)])
    assert max(abs(a - b) for a, b in zip(*curves, strict=True)) < 1e-2


def test_accumulation_equals_the_large_batch(
    new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    large, parts = new_trainee(), new_trainee()
    whole, pieces = new_loader(rows=6), new_loader(rows=2)
    for _ in range(3):
        one = train_step(large, [next(whole)], 1e-3, clip=1.0)
        many = train_step(parts, [next(pieces) for _ in range(3)], 1e-3, clip=1.0)
        assert many.loss == pytest.approx(one.loss, abs=1e-6)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    assert_same_weights(large, parts, tolerance=1e-6)


def test_packed_documents_have_the_gradient_of_the_same_alone(
    new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    batch = next(new_loader(rows=4))
    assert len(batch.lengths) > 4
    count = int((batch.targets != IGNORE).sum())
    packed, alone = new_trainee(), new_trainee()
    PackedLoss(packed.model)(batch).backward()
    parts = zip(*(x.split(batch.lengths) for x in (batch.tokens, batch.targets)), strict=True)
    for tokens, targets in parts:
        own = PackedBatch(tokens, targets, torch.arange(len(tokens)), [len(tokens)])
        PackedLoss(alone.model)(own, count).backward()
    for (name, a), b in zip(packed.model.named_parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-6, msg=name)


def test_clipping_bounds_the_update_and_the_norm_is_that_before(
    new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    trainee = new_trainee()
    trainee.optimizer = torch.optim.SGD(trainee.weights.masters.values(), lr=1.0)
    before = {name: p.detach().clone() for name, p in trainee.weights.masters.items()}
    result = train_step(trainee, [next(new_loader())], lr=1.0, clip=0.01)
    moved = math.sqrt(
        sum(
            float((p.detach() - before[n]).square().sum())
            for n, p in trainee.weights.masters.items()
        )
    )
    assert result.grad_norm > 0.1
    assert moved == pytest.approx(0.01, rel=1e-3)


@settings(max_examples=12)
@given(
    stops=st.lists(st.integers(1, 5), max_size=3),
    accumulation=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    optimizer=st.sampled_from([AdamWConfig(lr=1), MuonConfig(lr=1)]),
)
def test_a_resumed_run_is_the_uninterrupted_one(
    stops: list[int],
    accumulation: int,
    dtype: torch.dtype,
    optimizer: AdamWConfig | MuonConfig,
    new_trainee: NewTrainee,
    new_loader: NewLoader,
) -> None:
    with tempfile.TemporaryDirectory() as place:
        straight, broken = Path(place, "straight"), Path(place, "broken")
        whole = new_trainee(dtype, optimizer=optimizer)
        run(straight, whole, new_loader(), 6, accumulation=accumulation)
        for steps in [*sorted(stops), 6]:
            last = new_trainee(dtype, optimizer=optimizer)
            run(broken, last, new_loader(), steps, accumulation=accumulation)
        assert_same_weights(whole, last)
        assert metrics(straight) == metrics(broken)


def test_lines_after_the_checkpoint_are_forgotten(
    tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    run(tmp_path, new_trainee(), new_loader(), 3)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.1}\n{"step": 5, "lo')
    run(tmp_path, new_trainee(), new_loader(), 4)
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]


class Poisoned:
    """The batches of a loader, with some in between that hold token 60."""

    def __init__(self, loader: PackedLoader, places: set[int]) -> None:
        self.loader, self.places, self.drawn = loader, places, 0

    def __next__(self) -> PackedBatch:
        self.drawn += 1
        if self.drawn - 1 in self.places:
            tokens = torch.tensor([60, 1, 2, 3])
            return PackedBatch(tokens, tokens, torch.arange(4), [4])
        batch = next(self.loader)
        return PackedBatch(batch.tokens % 60, batch.targets, batch.positions, batch.lengths)

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loader.load_state_dict(state)


def poison(trainee: Trainee) -> Trainee:
    """Make token 60 give a loss that is not a number."""
    with torch.no_grad():
        trainee.weights.masters["model.embed_tokens.weight"][60] = math.nan
        trainee.weights.publish()
    return trainee


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_batch_that_is_not_finite_is_as_if_it_had_not_been(
    dtype: torch.dtype,
    tmp_path: Path,
    new_trainee: NewTrainee,
    new_loader: NewLoader,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clean, skipping = poison(new_trainee(dtype)), poison(new_trainee(dtype))
    run(tmp_path / "clean", clean, Poisoned(new_loader(), set()), 5)
    run_ = run(tmp_path / "skipping", skipping, Poisoned(new_loader(), {0, 3, 4}), 5)
    assert run_.state.skipped == 3
    assert_same_weights(clean, skipping)
    lines = metrics(tmp_path / "skipping")
    assert [x for x in lines if "skipped" not in x] == metrics(tmp_path / "clean")
    assert [x["step"] for x in lines if "skipped" in x] == [0, 2, 2]
    assert "batch after step 2 passed over: loss nan" in capsys.readouterr().err


def test_too_many_of_them_end_the_run(
    tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    loader = Poisoned(new_loader(), set(range(2, 99)))
    trainee = poison(new_trainee())
    with pytest.raises(UserError, match=r"3 batches in a row without a finite loss .* step 2"):
        run(tmp_path, trainee, loader, 5, max_skips=3)
    assert [x["step"] for x in metrics(tmp_path)] == [1, 2, 2, 2, 2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    number: signal.Signals,
    tmp_path: Path,
    new_trainee: NewTrainee,
    new_loader: NewLoader,
    capsys: pytest.CaptureFixture[str],
) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)

    def interrupt(model: Qwen2) -> dict[str, float]:
        os.kill(os.getpid(), number)
        return {}

    run_ = run(tmp_path, new_trainee(), new_loader(), 50, interrupt, evaluate_every=3)
    assert run_.state.step == 3
    assert run_.checkpoint == tmp_path / "checkpoints" / "step-00000003"
    assert f"{number.name}: stopped at step 3 of 50" in capsys.readouterr().err
    assert "<title>stopped 3/50 test </title>" in (tmp_path / "run.html").read_text()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    later = new_trainee()
    run(tmp_path, later, new_loader(), 5)
    whole = new_trainee()
    run(tmp_path / "whole", whole, new_loader(), 5)
    assert_same_weights(later, whole)


def test_evaluation_sees_a_model_without_gradients_and_is_logged(
    tmp_path: Path,
    new_trainee: NewTrainee,
    new_loader: NewLoader,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counter = itertools.count(1)

    def evaluate(loss: PackedLoss) -> dict[str, Any]:
        assert not loss.model.training
        assert not torch.is_grad_enabled()
        return {"bits_per_byte": next(counter)}

    trainee = new_trainee()
    run(tmp_path, trainee, new_loader(), 5, evaluate)
    found = [(x["step"], x["evaluation"]) for x in metrics(tmp_path) if "evaluation" in x]
    assert found == [(n, {"bits_per_byte": i}) for i, n in enumerate((2, 4, 5), start=1)]
    said = [json.loads(x) for x in capsys.readouterr().err.splitlines()]
    assert [(x["done"], x["evaluation"]) for x in said if "evaluation" in x] == found
    assert {"loss", "grad_norm", "tokens_per_s", "mfu", "eta_s"} <= set(said[-1])
    assert trainee.model.training


def test_metrics_have_what_the_report_needs(
    tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    run(tmp_path, new_trainee(), new_loader(), 2, accumulation=2)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    keys = {"step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "memory_gb", "tokens"}
    assert [set(line) for line in lines] == [keys, keys]
    assert [line["tokens"] for line in lines] == [64, 128]
    assert [line["lr"] for line in lines] == [1e-2, 5e-3]
    assert all(line["tokens_per_s"] > 0 and line["mfu"] > 0 for line in lines)


def test_the_output_z_loss_is_logged_beside_the_loss(
    tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    """Of two micro-batches; the loss stays the cross-entropy."""
    run(tmp_path / "off", new_trainee(), new_loader(), 1, accumulation=2)
    run(tmp_path / "on", new_trainee(), new_loader(), 1, accumulation=2, output_z_loss=0.1)
    (off,), (on,) = metrics(tmp_path / "off"), metrics(tmp_path / "on")
    assert on["loss"] == pytest.approx(off["loss"], abs=1e-6)
    assert on["output_z_loss"] == pytest.approx(math.log(61) ** 2, rel=0.05)
    assert "output_z_loss" not in off
    assert on["grad_norm"] != pytest.approx(off["grad_norm"], rel=1e-3)


def test_the_output_z_loss_keeps_the_logsumexp_small(
    new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    last = []
    for coefficient in (1e-9, 1.0):
        trainee, loader = new_trainee(), new_loader()
        steps = [
            train_step(trainee, [next(loader)], 1e-2, 1.0, output_z_loss=coefficient)
            for _ in range(30)
        ]
        last.append(steps[-1].square_log_z)
    assert last[1] < 0.5 * last[0]


def test_checkpoints_written_beside_training_change_nothing(
    tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    class Stopping:
        """Is asked to stop in the fifth step."""

        def __init__(self, inner: PackedLoader) -> None:
            self.inner = inner
            self.state_dict, self.load_state_dict = inner.state_dict, inner.load_state_dict

        def __next__(self) -> PackedBatch:
            if self.inner.row == 4 * self.inner.rows:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(self.inner)

    plain, beside = new_trainee(), new_trainee()
    run(tmp_path / "plain", plain, new_loader(), 8, checkpoint_every=2)
    settings_ = {"checkpoint_every": 2, "async_checkpoints": True}
    stopped = run(tmp_path / "beside", new_trainee(), Stopping(new_loader()), 8, **settings_)
    assert stopped.state.step == 5
    assert stopped.checkpoint == tmp_path / "beside/checkpoints/step-00000005"
    done = run(tmp_path / "beside", beside, new_loader(), 8, **settings_)
    assert done.checkpoint == tmp_path / "beside/checkpoints/step-00000008"
    assert_same_weights(plain, beside)
    assert metrics(tmp_path / "beside") == metrics(tmp_path / "plain")
