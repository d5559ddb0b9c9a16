"""AdamW: which parameters decay, and its numbers by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qwen2.train.loop import Trainee
from qwen2.train.optimizers import AdamWConfig, parameter_groups


def test_two_steps_by_hand() -> None:
    matrix, vector = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1))
    optimizer = AdamWConfig(lr=0.1).build({"matrix": matrix, "vector": vector})
    for gradient, decayed, plain in (
        # m = 0.05, v = 0.0125; unbiased 0.5 and 0.25, so the step is lr·1.
        (0.5, 1 * 0.99 - 0.1, 1 - 0.1),
        # m = -0.005, v = 0.024375; unbiased -0.005/0.19 and 0.25: lr·(-0.0526316).
        (-0.5, 0.89 * 0.99 + 0.00526316, 0.9 + 0.00526316),
    ):
        for parameter in (matrix, vector):
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
        assert matrix.item() == pytest.approx(decayed, abs=1e-6)
        assert vector.item() == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("tied", [True, False])
def test_norms_and_biases_do_not_decay(tied: bool, new_trainee: Callable[..., Trainee]) -> None:
    model = new_trainee(tie_word_embeddings=tied).model
    named = dict(model.named_parameters())
    decayed, plain = parameter_groups(named, 0.1)
    assert decayed["weight_decay"] == 0.1
    assert plain["weight_decay"] == 0
    spared = {id(p) for p in plain["params"]}
    assert spared == {id(p) for name, p in named.items() if name.endswith(("norm.weight", ".bias"))}
    total = sum(p.numel() for group in (decayed, plain) for p in group["params"])
    assert total == model.config.num_parameters()
