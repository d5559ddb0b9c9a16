"""Training mixtures: what is logged, what the routers' losses do, accumulation and resuming."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.model.config import Mixture
from qwen2.model.moe import Routing, expert_entropy
from qwen2.tokens.loader import PackedLoader
from qwen2.train.loop import LoopSettings, Run
from qwen2.train.loss import IGNORE
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.router import RouterLosses
from qwen2.train.step import Trainee, train_step

NewTrainee = Callable[..., Trainee]
NewLoader = Callable[..., PackedLoader]
CPU = torch.device("cpu")


def mixture(**changes: Any) -> Mixture:
    """4 experts of which 2, and a shared one."""
    sizes = {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 8,
        "shared_expert_intermediate_size": 8,
    }
    return Mixture(**sizes | changes)


MACHINE = {"tokens_per_s", "mfu", "memory_gb"}


def run(out: Path, trainee: Trainee, loader: PackedLoader, steps: int, **settings: Any) -> None:
    lr = lambda step: 1e-2 / (1 + step)  # noqa: E731
    run_ = Run(trainee, loader, LoopSettings(**settings), lr, out, "test", 1e9)
    run_.train(steps)
    run_.metrics.close()


def metrics(out: Path) -> list[dict[str, Any]]:
    """The metrics without what the machine says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in MACHINE} for x in lines]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_log_says_where_tokens_go(
    dtype: torch.dtype, tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    run(tmp_path, new_trainee(dtype, moe=mixture()), new_loader(), 3, accumulation=2)
    lines = metrics(tmp_path)
    assert len(lines) == 3
    for line in lines:
        assert len(line["expert_share"]) == 4
        assert sum(line["expert_share"]) == pytest.approx(1.0, abs=1e-5)
        assert 0 <= line["expert_entropy"] <= 1
        assert line["dropped"] == 0
        assert 2 - 1e-3 < line["balance_loss"] < 4
        # Weights are small yet.
        assert line["router_z_loss"] == pytest.approx(math.log(4) ** 2, rel=0.1)
    assert lines[0]["loss"] == pytest.approx(math.log(61), abs=0.1)


def test_the_logged_loss_is_the_cross_entropy(
    new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    batch = next(new_loader())
    trainee = new_trainee(moe=mixture(router_aux_loss_coef=5.0))
    expected = PackedLoss(trainee.model)(batch).item()
    result = train_step(trainee, [batch], 1e-3, clip=1.0, router_z_loss=3.0)
    assert result.loss == pytest.approx(expected, abs=1e-6)


def test_the_gradient_is_that_of_the_three_losses(
    new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    """Over two micro-batches of different sizes, each weighted by its share of the tokens."""
    moe = mixture(router_aux_loss_coef=0.5)
    batches = [next(new_loader(rows=1)), next(new_loader(rows=3))]
    count = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
    plain = new_trainee(moe=moe)
    for batch, weight in zip(batches, (0.25, 0.75), strict=True):
        routing = Routing(moe, CPU)
        loss = PackedLoss(plain.model)(batch, count, routing)
        routers = 0.5 * routing.balance_loss() + 0.125 * routing.z_loss()
        (loss + weight * routers).backward()
    expected = torch.nn.utils.get_total_norm([p.grad for p in plain.model.parameters()])
    result = train_step(new_trainee(moe=moe), batches, 1e-3, clip=1.0, router_z_loss=0.125)
    assert result.grad_norm == pytest.approx(expected.item(), rel=1e-5)


def test_figures_of_micro_batches_by_hand() -> None:
    """12 tokens of which 3 and 9; the first all to expert 0 with p = 3/4, the second half each."""
    moe = mixture(num_experts=2, num_experts_per_tok=1, router_aux_loss_coef=0.1)
    losses = RouterLosses(moe, z_coefficient=0.01, tokens=12)
    added = []
    for tokens, counts, first in ((3, [3, 0], 0.75), (9, [4, 5], 0.5)):
        routing = Routing(moe, CPU)
        routing.counts = torch.tensor(counts)
        routing.probabilities = torch.tensor([first, 1 - first]) * tokens
        routing.square_logsumexp = torch.tensor(4.0 * tokens)
        routing.tokens = routing.pairs = tokens
        added.append(losses.add(routing, tokens).item())
    # 2·(1·3/4) = 1.5 and 2·(4/9 + 5/9)/2 = 1; z is 4 in both
    assert added == pytest.approx([0.25 * (0.15 + 0.04), 0.75 * (0.1 + 0.04)])
    figures = losses.figures()
    assert figures["balance_loss"] == pytest.approx(0.25 * 1.5 + 0.75)
    assert figures["router_z_loss"] == pytest.approx(4.0)
    assert figures["expert_share"] == pytest.approx([7 / 12, 5 / 12], abs=1e-6)
    assert figures["expert_entropy"] == pytest.approx(expert_entropy(torch.tensor([7, 5])))
    assert figures["dropped"] == 0


def test_balance_trains_the_routers_towards_uniform(
    new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    """From routers that send every token to the same two experts of four, by this loss alone."""
    moe = mixture()
    model, loader = new_trainee(moe=moe).model, new_loader(rows=4)
    gates = [layer.mlp.gate.weight for layer in model.model.layers]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.1  # what all tokens share
        for gate in gates:
            gate[:2, 0] = 0.5
    optimizer = torch.optim.Adam(gates, lr=1e-2)
    seen = []
    for _ in range(60):
        routing = Routing(moe, CPU)
        PackedLoss(model)(next(loader), routing=routing)
        routing.balance_loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append((expert_entropy(routing.counts), routing.balance_loss().item()))
    assert seen[0][0] == pytest.approx(0.5, abs=0.01)  # ln 2 / ln 4
    assert seen[0][1] > 2.5
    assert seen[-1][0] > 0.97
    assert seen[-1][1] == pytest.approx(2.0, abs=0.05)


def test_the_z_loss_keeps_logits_small(new_trainee: NewTrainee, new_loader: NewLoader) -> None:
    """Of an even router logsumexp² falls below ln² E, which the sum of its logits can."""
    last = []
    for router_z_loss in (0.0, 1.0):
        trainee, loader = new_trainee(moe=mixture()), new_loader()
        steps = [train_step(trainee, [next(loader)], 1e-2, 1.0, router_z_loss) for _ in range(20)]
        last.append(steps[-1].routers["router_z_loss"])
    assert last[1] < 0.8 * last[0]


def test_accumulation_equals_the_large_batch(
    new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    """In the cross-entropy; the balance loss is one of each micro-batch, so it is off here."""
    moe = mixture(router_aux_loss_coef=0.0)
    large, parts = new_trainee(moe=moe), new_trainee(moe=moe)
    whole, pieces = new_loader(rows=6), new_loader(rows=2)
    for _ in range(3):
        one = train_step(large, [next(whole)], 1e-3, clip=1.0, router_z_loss=0.1)
        many = train_step(
            parts, [next(pieces) for _ in range(3)], 1e-3, clip=1.0, router_z_loss=0.1
        )
        assert many.loss == pytest.approx(one.loss, abs=1e-6)
        assert many.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
        assert many.routers["expert_share"] == one.routers["expert_share"]
        assert many.routers["router_z_loss"] == pytest.approx(
            one.routers["router_z_loss"], rel=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_is_the_uninterrupted_one(
    dtype: torch.dtype, tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    trainees = [new_trainee(dtype, moe=mixture()) for _ in range(3)]
    run(tmp_path / "straight", trainees[0], new_loader(), 5, router_z_loss=0.01)
    for trainee, steps in zip(trainees[1:], (2, 5), strict=True):
        run(tmp_path / "broken", trainee, new_loader(), steps, router_z_loss=0.01)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "broken")
    pairs = zip(
        trainees[0].weights.masters.items(), trainees[2].weights.masters.values(), strict=True
    )
    for (name, one), other in pairs:
        assert torch.equal(one, other), name


def test_every_expert_learns(new_trainee: NewTrainee, new_loader: NewLoader) -> None:
    trainee, loader = new_trainee(moe=mixture()), new_loader(rows=4)
    before = trainee.model.model.layers[0].mlp.experts.gate_up_proj.detach().clone()
    losses = [train_step(trainee, [next(loader)], 1e-2, clip=1.0).loss for _ in range(60)]
    assert sum(losses[-5:]) / 5 < 1.5
    moved = trainee.model.model.layers[0].mlp.experts.gate_up_proj.detach() - before
    assert (moved.flatten(1).norm(dim=1) > 0.1).all()


def test_stacked_experts_decay_and_routers_too(new_trainee: NewTrainee) -> None:
    trainee = new_trainee(moe=mixture())
    decayed = {id(p) for p in trainee.optimizer.param_groups[0]["params"]}
    names = {n for n, p in trainee.weights.masters.items() if id(p) in decayed}
    place = "model.layers.1.mlp"
    assert {
        f"{place}.experts.gate_up_proj",
        f"{place}.experts.down_proj",
        f"{place}.gate.weight",
        f"{place}.shared_expert_gate.weight",
    } <= names
    assert not [n for n in names if n.endswith(("norm.weight", ".bias"))]
    spared = len(list(itertools.chain(*(g["params"] for g in trainee.optimizer.param_groups[1:]))))
    assert len(names) + spared == len(trainee.weights.masters)
