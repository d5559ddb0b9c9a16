"""AdamW and Muon: which parameters they step and decay, and their numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from qwen2.model.config import Mixture
from qwen2.tokens.loader import PackedLoader
from qwen2.train.optimizers import (
    AdamWConfig,
    MuonConfig,
    OptimizerConfig,
    hidden_matrices,
    orthogonalise,
    parameter_groups,
)
from qwen2.train.step import Trainee, train_step

MOE = Mixture(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=8
)
SHAPES: list[dict[str, Any]] = [
    {"tie_word_embeddings": False},
    {"tie_word_embeddings": True},
    {"moe": MOE},
]


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


@pytest.mark.parametrize("changes", SHAPES)
@pytest.mark.parametrize("config", [AdamWConfig(lr=1), MuonConfig(lr=1)])
def test_groups_hold_every_parameter_once(
    config: AdamWConfig | MuonConfig, changes: dict[str, Any], new_trainee: Callable[..., Trainee]
) -> None:
    model = new_trainee(**changes).model
    groups = config.build(dict(model.named_parameters())).param_groups
    held = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in held}) == len(held)
    assert sum(p.numel() for p in held) == model.config.num_parameters()


@pytest.mark.parametrize("changes", SHAPES)
def test_muon_has_the_matrices_between_embedding_and_head(
    changes: dict[str, Any], new_trainee: Callable[..., Trainee]
) -> None:
    hidden, rest = hidden_matrices(dict(new_trainee(**changes).model.named_parameters()))
    ends = ("proj.weight", "gate_up_proj", "down_proj", "mlp.gate.weight")
    assert hidden[1]
    assert all(name.endswith(ends) for group in hidden.values() for name in group)
    others = ("embed_tokens.weight", "lm_head.weight", "norm.weight", ".bias", "expert_gate.weight")
    assert all(name.endswith(others) for name in rest)
    assert {name.split(".")[-1] for name in hidden.get(2, {})} <= {"gate_up_proj"}
    assert (2 in hidden) == ("moe" in changes)


@pytest.mark.parametrize("shape", [(6, 6), (20, 6), (6, 20), (3, 6, 10)])
def test_orthogonalising_moves_the_singular_values_alone(shape: tuple[int, ...]) -> None:
    """The iteration is 3.4445s - 4.775s³ + 2.0315s⁵ of each; vectors stay as they are."""
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = u @ torch.diag_embed(s) @ vh
    torch.testing.assert_close(orthogonalise(matrices), expected, rtol=1e-9, atol=1e-9)
    assert 0.6 < s.min() <= s.max() < 1.3


def test_nothing_to_orthogonalise_stays_nothing() -> None:
    assert orthogonalise(torch.zeros(3, 4)).abs().max() == 0


def test_a_step_of_muon_by_hand() -> None:
    """A diagonal gradient: its average 0.05·g, Nesterov's 0.0975·g; the scale 0.2·sqrt(2)."""
    matrix = nn.Parameter(torch.ones(2, 2))
    optimizer = MuonConfig(lr=0.1, weight_decay=0.5).build({"q_proj.weight": matrix})
    matrix.grad = torch.diag(torch.tensor([3.0, 4.0]))
    turned = []
    for s in (0.6, 0.8):
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        turned.append(s)
    optimizer.step()
    average = optimizer.state[matrix]["momentum_buffer"]
    torch.testing.assert_close(average, torch.diag(torch.tensor([0.15, 0.2])))
    moved = 0.1 * 0.2 * math.sqrt(2) * torch.diag(torch.tensor(turned))
    torch.testing.assert_close(matrix.detach(), 0.95 - moved)


def test_stacked_experts_are_the_published_matrices_one_by_one() -> None:
    """Stepped by torch's Muon, whose iteration is in bf16: so the tolerance."""
    generator = torch.Generator().manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 12, 8, generator=generator))
    ours = MuonConfig(lr=0.1).build({"experts.gate_up_proj": stack})
    single = [nn.Parameter(part.clone()) for one in stack.detach() for part in one.chunk(2)]
    theirs = torch.optim.Muon(single, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = stack.detach().clone()
    for _ in range(3):
        stack.grad = torch.randn(stack.shape, generator=generator)
        for parameter, gradient in zip(single, stack.grad.reshape(6, 6, 8), strict=True):
            parameter.grad = gradient
        ours.step()
        theirs.step()
    peer = torch.stack([p.detach() for p in single]).reshape(3, 12, 8)
    assert (stack.detach() - peer).norm() < 0.03 * (peer - before).norm()


def test_the_rest_is_stepped_as_by_adamw(new_trainee: Callable[..., Trainee]) -> None:
    models = [new_trainee(moe=MOE).model for _ in range(2)]
    for model, config in zip(models, (AdamWConfig(lr=0.1), MuonConfig(lr=0.1)), strict=True):
        optimizer = config.build(dict(model.named_parameters()))
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()
    _, rest = hidden_matrices(dict(models[0].named_parameters()))
    twins = dict(models[1].named_parameters())
    for name, parameter in models[0].named_parameters():
        assert torch.equal(parameter, twins[name]) == (name in rest), name


@pytest.mark.parametrize("changes", SHAPES)
def test_muon_learns(
    changes: dict[str, Any],
    new_trainee: Callable[..., Trainee],
    new_loader: Callable[..., PackedLoader],
) -> None:
    trainee, loader = new_trainee(**changes), new_loader(rows=4)
    trainee.optimizer = MuonConfig(lr=1e-2).build(trainee.weights.masters)
    losses = [train_step(trainee, [next(loader)], 1e-2, clip=1.0).loss for _ in range(60)]
    assert sum(losses[-5:]) / 5 < 1.5


def test_recipes_choose_by_kind_and_adamw_is_what_they_mean_without() -> None:
    read = TypeAdapter(OptimizerConfig).validate_python
    assert read({"lr": 1}) == AdamWConfig(lr=1)
    assert read({"kind": "muon", "lr": 1, "momentum": 0.9}) == MuonConfig(lr=1, momentum=0.9)
    assert read(MuonConfig(lr=1)) == MuonConfig(lr=1)
    for wrong in ({"kind": "lion", "lr": 1}, {"lr": 1, "momentum": 0.9}):
        with pytest.raises(ValidationError):
            read(wrong)
