"""Layers divided into stages: a step by 1F1B against the same step of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import MOE, compare, new_batch, new_model, new_world, total_count

from qwen2.common.errors import UserError
from qwen2.model.config import SlidingWindow
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
        pytest.param({"pp": 4}, {"num_hidden_layers": 5, **MOE}, "full", id="pp 4, mixture"),
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


def too_few() -> None:
    """In a rank: a step that does not fill the pipeline is refused before anything is sent."""
    loss_of = parallelise(new_model({}), new_world({"pp": 2}, {}), torch.float32)
    batches = [new_batch(0)]
    with pytest.raises(UserError, match=r"pp 2: a rank.s part of a step is 1 micro-batches"):
        loss_of.backward(batches, total_count(batches))


def test_fewer_micro_batches_than_stages_are_refused(in_ranks: RunInRanks) -> None:
    in_ranks(2, too_few)


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
