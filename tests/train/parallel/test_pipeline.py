"""Layers divided into stages: a step by 1F1B against the same step of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import (
    MOE,
    compare,
    new_batch,
    new_model,
    new_world,
    total_count,
    whole,
)
from torch import nn

from qwen2.common.errors import UserError
from qwen2.model.config import SlidingWindow
from qwen2.train.checkpointer import Checkpointer
from qwen2.train.checkpoints import RunState, load_checkpoint
from qwen2.train.loop import LoopSettings
from qwen2.train.optimizers import AdamWConfig
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.parallelise import parallelise

RunInRanks = Callable[..., list[Any]]

THREE: dict[str, Any] = {"num_hidden_layers": 3}
"""Over two stages: two and one."""
SLIDING = {**THREE, "sliding": SlidingWindow(size=4, layers=(2,))}
"""The last stage's first layer is the one with a window."""


@pytest.mark.parametrize(
    ("changes", "micro_batches", "recompute", "zeta"),
    [
        pytest.param(THREE, 2, "none", 0.0, id="dense"),
        pytest.param(SLIDING, 3, "full", 0.1, id="window, recompute, z-loss"),
        pytest.param({**THREE, **MOE}, 3, "none", 0.1, id="mixture, z-loss"),
        pytest.param({**THREE, **MOE}, 4, "full", 0.0, id="mixture, recompute"),
    ],
)
def test_two_stages_compute_what_one_process_does(
    in_ranks: RunInRanks, changes: dict[str, Any], micro_batches: int, recompute: str, zeta: float
) -> None:
    in_ranks(2, compare, {"pp": 2}, changes, micro_batches, recompute, zeta)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "changes", "recompute"),
    [
        pytest.param({"pp": 4}, {"num_hidden_layers": 5}, "none", id="pp 4"),
        pytest.param({"pp": 4}, {"num_hidden_layers": 5, **MOE}, "selective", id="pp 4, mixture"),
        pytest.param({"pp": 2}, THREE, "full", id="pp 2, fsdp 2"),
        pytest.param({"pp": 2}, {**THREE, **MOE}, "full", id="pp 2, fsdp 2, mixture"),
        pytest.param({"pp": 2, "ep": 2}, {**THREE, **MOE}, "none", id="pp 2, ep 2"),
        pytest.param({"pp": 2, "dp_replicate": 2}, THREE, "none", id="pp 2, hsdp 2 x 1"),
        pytest.param({"pp": 2, "tp": 2}, THREE, "full", id="pp 2, tp 2"),
        pytest.param({"pp": 2, "tp": 2}, {**THREE, **MOE}, "none", id="pp 2, tp 2, mixture"),
        pytest.param({"pp": 2, "cp": 2}, THREE, "none", id="pp 2, cp 2"),
        pytest.param({"pp": 2, "cp": 2}, {**THREE, **MOE}, "none", id="pp 2, cp 2, mixture"),
    ],
)
def test_four_ranks_compute_what_one_process_does(
    in_ranks: RunInRanks, sizes: dict[str, int], changes: dict[str, Any], recompute: str
) -> None:
    in_ranks(4, compare, sizes, changes, 5, recompute, 0.1)


def in_bf16() -> None:
    """In a rank: hidden states travel in the compute dtype; weights and gradients are in fp32."""
    world, batches = new_world({"pp": 2}, MOE), [new_batch(number) for number in range(2)]
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        model = new_model(MOE)
        loss_of = parallelise(model, world, dtype)
        losses.append(world.sum(loss_of.backward(batches, total_count(batches)), "data").item())
        with torch.no_grad():
            held_out = sum(world.sum(loss_of(batch, 1), "data").item() for batch in batches)
        assert held_out / total_count(batches) == pytest.approx(losses[-1], rel=1e-2)
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_stages_send_the_compute_dtype(in_ranks: RunInRanks) -> None:
    in_ranks(2, in_bf16)


def trained(loss_of: PackedLoss) -> tuple[dict[str, nn.Parameter], torch.optim.Optimizer]:
    """The weights here and their optimizer after a step of two micro-batches."""
    masters = dict(loss_of.model.named_parameters())
    # eps is so large that the rounding of gradients stays what it is.
    optimizer = AdamWConfig(lr=0.01, eps=0.01).build(masters)
    batches = [new_batch(number) for number in range(2)]
    loss_of.backward(batches, total_count(batches))
    optimizer.step()
    return masters, optimizer


def save(folder: Path) -> None:
    """In a rank: two stages save what each of them has."""
    world = new_world({"pp": 2}, THREE)
    loss = parallelise(new_model(THREE), world, torch.float32)
    masters, optimizer = trained(loss)
    assert ("model.layers.2.mlp.up_proj.weight" in masters) == (world.stage == 1)
    checkpoints = Checkpointer(folder, keep=1)
    checkpoints.save(RunState(step=1), masters, optimizer, {}, LoopSettings(), loss.model.config)


def load(folder: Path, sizes: dict[str, int] | None = None) -> None:
    """In a rank, or without `sizes` in one process: what is read is what one process trains."""
    model = new_model(THREE)
    if sizes is not None:
        parallelise(model, new_world(sizes, THREE), torch.float32)
    masters = dict(model.named_parameters())
    optimizer = AdamWConfig(lr=0.01).build(masters)
    load_checkpoint(folder / "step-00000001", masters, optimizer)
    expected, reference = trained(PackedLoss(new_model(THREE)))
    for name, master in masters.items():
        torch.testing.assert_close(whole(master), whole(expected[name]), atol=1e-5, rtol=1e-5)
        state = optimizer.state[master]
        assert state.keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key, value in reference.state[expected[name]].items():
            torch.testing.assert_close(whole(state[key]), value, atol=1e-5, rtol=1e-5)


def test_a_checkpoint_of_stages_is_read_by_any_number_of_them(
    in_ranks: RunInRanks, tmp_path: Path
) -> None:
    in_ranks(2, save, tmp_path)
    load(tmp_path)
    for sizes in ({"pp": 2}, {"dp_shard": 2}):
        in_ranks(2, load, tmp_path, sizes)


def load_another(folder: Path) -> None:
    """In a rank: a model with a layer more is refused by both stages, though one has it all."""
    changes = {"num_hidden_layers": 4}
    model = new_model(changes)
    parallelise(model, new_world({"pp": 2}, changes), torch.float32)
    masters = dict(model.named_parameters())
    with pytest.raises(UserError, match=r"layers.3.* is only in the model"):
        load_checkpoint(folder / "step-00000001", masters, AdamWConfig(lr=0.01).build(masters))


def test_a_checkpoint_of_another_model_is_refused_by_all_stages(
    in_ranks: RunInRanks, tmp_path: Path
) -> None:
    in_ranks(2, save, tmp_path)
    in_ranks(2, load_another, tmp_path)
