"""Compiled training against plain: the same loss, and no code made anew for each batch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from qwen2.common.errors import UserError
from qwen2.model import kernels
from qwen2.model.config import DualChunk, Mixture, ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.tokens.packing import PackedBatch
from qwen2.train.compiling import COMPILED, compiled
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.pretrain import PretrainRecipe, pretrain
from qwen2.train.recompute import Recompute, recompute_activations

CPU = torch.device("cpu")
MOE = Mixture(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=24,  # as wide as the dense layer
)
BATCHES = [[40, 8, 16], [64], [16] * 4, [1, 62, 1], [2] * 32]
"""Documents of batches of 64 tokens."""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler here")


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def new_model(small: ModelConfig, how: Recompute = "none", **changes: Any) -> Qwen2:
    model = Qwen2(small.model_copy(update=changes))
    init_weights(model, torch.Generator().manual_seed(0))
    recompute_activations(model, how)
    return model


def batch(lengths: list[int]) -> PackedBatch:
    ids = torch.randint(0, 61, (sum(lengths) + 1,), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in lengths])
    return PackedBatch(ids[:-1], ids[1:], positions, lengths)


def step(model: Qwen2, lengths: list[int]) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients of this batch and those before."""
    loss = PackedLoss(model)(batch(lengths))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def graphs() -> int:
    """Pieces of code that were made."""
    return counters["stats"]["unique_graphs"]


@needs_compiler
@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"moe": MOE}, {"dual_chunk": DualChunk(chunk_size=16, local_size=4)}],
    ids=["dense", "mixture", "dual chunk"],
)
def test_loss_and_gradients_are_those_of_plain_training(
    small: ModelConfig, how: Recompute, changes: dict[str, Any]
) -> None:
    plain, model = new_model(small, "none", **changes), new_model(small, how, **changes)
    for lengths in BATCHES[:2]:
        expected_loss, expected = step(plain, lengths)
        with compiled(True, CPU):
            loss, found = step(model, lengths)
        assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert graphs()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


@needs_compiler
@pytest.mark.parametrize("changes", [{}, {"moe": MOE}], ids=["dense", "mixture"])
def test_documents_of_other_lengths_cause_no_compiling(
    small: ModelConfig, changes: dict[str, Any]
) -> None:
    """Layers share the code; it is made for the heads of queries, and then for any heads."""
    model = new_model(small, **changes)
    with compiled(True, CPU):
        for lengths in BATCHES:
            step(model, lengths)
            assert graphs() == len(COMPILED) + 1
        for tokens in (48, 80, 96):  # a phase of another batch: once more, then for any size
            step(model, [tokens])
            assert graphs() == 2 * len(COMPILED) + 1
    assert not counters["graph_break"]


@needs_compiler
def test_selective_checkpointing_runs_no_product_again(small: ModelConfig) -> None:
    """Nor does compiled code hide one."""

    def products(how: Recompute, compile_: bool) -> int:
        model = new_model(small, how)
        with compiled(compile_, CPU):
            step(model, BATCHES[0])
            with torch.profiler.profile() as profile:
                step(model, BATCHES[0])
        counts = {event.key: event.count for event in profile.key_averages()}
        return counts["aten::mm"] + counts["aten::addmm"]

    assert products("none", True) == products("none", False)
    assert products("selective", True) == products("selective", False)


@needs_compiler
def test_evaluation_is_not_compiled_and_nothing_stays(small: ModelConfig) -> None:
    model = new_model(small)
    with compiled(True, CPU), torch.no_grad():
        PackedLoss(model)(batch(BATCHES[0]))
    step(model, BATCHES[0])
    with compiled(False, CPU):
        step(model, BATCHES[0])
    assert graphs() == 0
    assert all(operation.compiled is None for operation in kernels.TABLE.values())


@needs_compiler
def test_a_run_of_a_recipe(recipe: dict[str, Any]) -> None:
    losses = []
    for name in ("plain", "compiled"):
        changes = {"out": f"{recipe['out']}-{name}", "compile": name == "compiled", "dtype": "fp32"}
        asked = PretrainRecipe.parse({**recipe, **changes})
        pretrain(asked)
        lines = [json.loads(x) for x in (asked.out / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
        assert bool(graphs()) == asked.compile
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_missing_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(UserError, match=r"^compile: needs a C\+\+ compiler.*install g\+\+"):
        compiled(True, CPU).__enter__()
    assert all(operation.compiled is None for operation in kernels.TABLE.values())
