"""Tokens that travel to their experts against all experts in one place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qwen2.model.experts import loop_experts
from qwen2.train.expert_parallel import travelling_experts

RunInRanks = Callable[..., list[Any]]
N, C, I, E, K = 10, 8, 6, 4, 2  # noqa: E741


def travel(most: int) -> None:
    """In a rank: its tokens go to experts below `most` alone; output and all gradients."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(ranks, N + ranks, C, generator=generator)
    stacks = (
        torch.randn(E, 2 * I, C, generator=generator),
        torch.randn(E, C, I, generator=generator),
    )
    scores = torch.rand(ranks, N + ranks, most, generator=generator)
    gate_up, down = (stack.requires_grad_() for stack in stacks)
    wholes = []
    for other in range(ranks):  # ranks have different numbers of tokens
        x = tokens[other, : N + other].clone().requires_grad_()
        weights, ids = scores[other, : N + other].topk(K)
        weights.requires_grad_()
        y = loop_experts(x, gate_up, down, ids, weights)
        y.square().sum().backward()
        wholes.append((x, ids, weights, y))
    x, ids, weights, y = wholes[rank]
    own = slice(rank * E // ranks, (rank + 1) * E // ranks)
    inputs = [t.detach().clone().requires_grad_() for t in (x, gate_up[own], down[own], weights)]
    found = travelling_experts(*inputs[:3], ids, inputs[3], dist.group.WORLD)  # type: ignore[arg-type]
    torch.testing.assert_close(found, y)
    found.square().sum().backward()
    assert gate_up.grad is not None
    assert down.grad is not None
    expected = (x.grad, gate_up.grad[own], down.grad[own], weights.grad)
    for tensor, gradient in zip(inputs, expected, strict=True):
        torch.testing.assert_close(tensor.grad, gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("most", [E, E // 2], ids=["all experts", "none of the last rank"])
def test_experts_elsewhere_compute_what_they_do_here(in_ranks: RunInRanks, most: int) -> None:
    in_ranks(2, travel, most)
