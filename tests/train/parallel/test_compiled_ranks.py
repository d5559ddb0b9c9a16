"""Compiled code in ranks: loss and gradients of their sum against one process without it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import CPU, MIXTURE, new_batch, new_model, new_world, total_count
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from qwen2.train.compiling import compiled
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.parallelise import parallelise
from qwen2.train.recompute import recompute_activations

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


def compare(sizes: dict[str, int], changes: dict[str, Any]) -> None:
    """In a rank: two steps, so that weights are gathered anew for code that is there already."""
    torch._dynamo.reset()
    counters.clear()
    alone, model = new_model(changes), new_model(changes)
    world = new_world(sizes, changes)
    count = total_count([new_batch(number) for number in range(world.mesh.dp)])
    recompute_activations(model, "selective")
    loss_of = parallelise(model, world, torch.float32)
    for _ in range(2):
        expected = torch.zeros(())
        for number in range(world.mesh.dp):
            expected = expected + PackedLoss(alone)(new_batch(number), count)
        expected.backward()
        with compiled(True, CPU):
            loss = loss_of(new_batch(world.dp_rank), count)
            loss.backward()
        assert world.sum(loss.detach(), "data").item() == pytest.approx(expected.item(), rel=1e-5)
    assert counters["stats"]["unique_graphs"]
    own = dict(model.named_parameters())
    for name, parameter in alone.named_parameters():
        gradient = own[name].grad
        whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
        torch.testing.assert_close(whole, parameter.grad, atol=1e-5, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param({}, {}, id="fsdp 2"),
        pytest.param({}, {"moe": MIXTURE}, id="fsdp 2, mixture"),
        pytest.param({"cp": 2}, {}, id="cp 2"),
        pytest.param({"tp": 2}, {}, id="tp 2"),
        pytest.param({"tp": 2}, {"intermediate_size": 37}, id="tp 2, uneven"),
    ],
)
def test_two_ranks_compute_what_one_does(
    in_ranks: Callable[..., list[Any]], sizes: dict[str, int], changes: dict[str, Any]
) -> None:
    in_ranks(2, compare, sizes, changes)
