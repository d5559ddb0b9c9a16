"""Cross-entropy over shares of the vocabulary against that of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qwen2.train.loss import IGNORE, OutputZ, VocabularyShare, chunked_cross_entropy

RunInRanks = Callable[..., list[Any]]
N, C, V = 11, 6, 7
WIDTH = 4  # so the second rank has 3


def compare(scale: float, zeta: float) -> None:
    """In a rank: loss, the gradient of hidden states summed over ranks, and that of its rows."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, C, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = scale * torch.randn(V, C, generator=generator, dtype=torch.float64)
    weight.requires_grad_()
    targets = torch.tensor([0, 6, 3, 4, IGNORE, 5, 2, 1, 6, IGNORE, 0])  # of both ranks
    whole, parts = (OutputZ(zeta) if zeta else None for _ in range(2))
    loss = chunked_cross_entropy(hidden, weight, targets, count=13, z=whole)
    loss.backward()
    own = slice(WIDTH * rank, WIDTH * (rank + 1))
    ours, rows = (x.detach().clone().requires_grad_() for x in (hidden, weight[own]))
    share = VocabularyShare(group, WIDTH * rank, WIDTH)
    shared = chunked_cross_entropy(ours, rows, targets, count=13, block=4, z=parts, share=share)
    (3 * shared).backward()
    torch.testing.assert_close(shared, loss)
    assert hidden.grad is not None
    assert weight.grad is not None
    assert ours.grad is not None
    dist.all_reduce(ours.grad)
    torch.testing.assert_close(ours.grad, 3 * hidden.grad)
    torch.testing.assert_close(rows.grad, 3 * weight.grad[own])
    if whole and parts:
        assert parts.cross_entropy == pytest.approx(whole.cross_entropy)
        assert parts.square_log_z == pytest.approx(whole.square_log_z) != 0


@pytest.mark.parametrize("zeta", [0.0, 0.01])
@pytest.mark.parametrize("scale", [1.0, 1000.0], ids=["usual logits", "logits beyond exp"])
def test_shares_of_the_vocabulary_give_the_loss_of_the_whole(
    in_ranks: RunInRanks, scale: float, zeta: float
) -> None:
    in_ranks(2, compare, scale, zeta)
