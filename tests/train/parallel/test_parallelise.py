"""Loss and gradients of ranks together against those of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import (
    MIXTURE,
    MOE,
    alone,
    compare,
    gradients,
    new_batch,
    new_model,
    new_world,
    total_count,
)

from qwen2.train.parallelise import parallelise

RunInRanks = Callable[..., list[Any]]
SIX = {"moe": MIXTURE.model_copy(update={"num_experts": 6})}


def in_bf16(sizes: dict[str, int], changes: dict[str, Any]) -> None:
    """In a rank: weights and gradients stay in fp32 while the products are in bf16."""
    world, seen = new_world(sizes, changes), []
    for reshard in (True, False):
        model = new_model(changes)
        loss_of = parallelise(model, world, torch.bfloat16, reshard)
        count = total_count([new_batch(number) for number in range(world.mesh.dp)])
        loss = loss_of(new_batch(world.dp_rank), count)
        loss.backward()
        seen.append(world.sum(loss, "data").item())
    expected = alone(changes, world.mesh.dp, zeta=0.0)
    expected_loss = expected.loss[0].item()
    assert seen[0] == seen[1] != expected_loss
    assert seen[0] == pytest.approx(expected_loss, rel=1e-2)
    found = gradients(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}
    for name, gradient in expected.gradients.items():
        assert (found[name] - gradient).norm() < 0.05 * gradient.norm(), name
    with torch.no_grad():  # other kernels than with gradients
        held_out = world.sum(loss_of(new_batch(world.dp_rank), count), "data").item()
    assert held_out == pytest.approx(expected_loss, rel=1e-2)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param({}, {}, id="fsdp 2"),
        pytest.param({}, {"tie_word_embeddings": True}, id="fsdp 2, tied head"),
        pytest.param({"cp": 2}, {}, id="cp 2"),
        pytest.param({"cp": 2}, {"num_key_value_heads": 1}, id="cp 2, one kv head for both"),
        pytest.param({}, MOE, id="fsdp 2, mixture"),
        pytest.param({"ep": 2}, MOE, id="ep 2"),
        pytest.param({"tp": 2}, {}, id="tp 2"),
        pytest.param({"tp": 2}, {"tie_word_embeddings": True}, id="tp 2, tied head"),
        pytest.param({"tp": 2}, {"intermediate_size": 37}, id="tp 2, uneven"),
        pytest.param({"tp": 2}, MOE, id="tp 2, mixture"),
    ],
)
def test_two_ranks_compute_what_one_does(
    in_ranks: RunInRanks, sizes: dict[str, int], changes: dict[str, Any]
) -> None:
    in_ranks(2, compare, sizes, changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param({"dp_replicate": 2}, {}, id="hsdp 2 x 2"),
        pytest.param({"cp": 2}, {}, id="fsdp 2, cp 2"),
        pytest.param({"cp": 4}, {}, id="cp 4, two kv heads"),
        pytest.param({"ep": 2}, MOE, id="fsdp 4, ep 2"),
        pytest.param({"ep": 2}, SIX, id="fsdp 4, ep 2, three experts over two ranks"),
        pytest.param({"tp": 2}, {}, id="fsdp 2, tp 2"),
        pytest.param({"tp": 2}, {"tie_word_embeddings": True}, id="fsdp 2, tp 2, tied head"),
        pytest.param({"tp": 2}, {"intermediate_size": 37}, id="fsdp 2, tp 2, uneven"),
        pytest.param({"tp": 2, "cp": 2}, {}, id="cp 2, tp 2"),
        pytest.param({"tp": 2, "ep": 2}, MOE, id="fsdp 2, tp 2, ep 2"),
        pytest.param({"ep": 4, "cp": 2}, MOE, id="fsdp 2, cp 2, ep 4"),
        pytest.param({"ep": 2, "dp_replicate": 2}, MOE, id="hsdp 2 x 2, ep 2"),
    ],
)
def test_four_ranks_compute_what_one_does(
    in_ranks: RunInRanks, sizes: dict[str, int], changes: dict[str, Any]
) -> None:
    in_ranks(4, compare, sizes, changes)


@pytest.mark.parametrize(
    ("sizes", "changes"),
    [
        pytest.param({}, {}, id="fsdp 2"),
        pytest.param({"tp": 2}, {}, id="tp 2"),
    ],
)
def test_products_in_bf16_and_sums_in_fp32(
    in_ranks: RunInRanks, sizes: dict[str, int], changes: dict[str, Any]
) -> None:
    in_ranks(2, in_bf16, sizes, changes)


@pytest.mark.parametrize("how", ["selective", "full"])
@pytest.mark.parametrize("sizes", [{}, {"ep": 2}], ids=["fsdp 2", "ep 2"])
def test_activations_of_a_mixture_are_computed_again(
    in_ranks: RunInRanks, sizes: dict[str, int], how: str
) -> None:
    in_ranks(2, compare, sizes, MOE, 2, how)


@pytest.mark.parametrize("sizes", [{"tp": 2}, {"cp": 2}], ids=["tp 2", "cp 2"])
def test_gradients_of_micro_batches_add_up(in_ranks: RunInRanks, sizes: dict[str, int]) -> None:
    in_ranks(2, compare, sizes, {}, 2)
