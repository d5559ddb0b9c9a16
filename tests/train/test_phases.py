"""Phases: their plan, their data, the model in them, and resuming around their boundaries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file

from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig, Yarn
from qwen2.model.decoder import Qwen2
from qwen2.model.extend import reconfigure, with_config
from qwen2.model.hub import load_config
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.loader import PackedLoader
from qwen2.tokens.packing import PackedBatch
from qwen2.tokens.shards import Shards, write_shards
from qwen2.tokens.share_out import share_out
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.phases import (
    Phase,
    PhasedLoader,
    Stretch,
    config_of_phase,
    cuts,
    factor_at,
    lay_out,
)
from qwen2.train.pretrain import PretrainRecipe, build_loader, pretrain
from qwen2.train.schedules import Linear
from qwen2.train.step import Trainee

PHASES: list[dict[str, Any]] = [
    {"steps": 2},
    {"steps": 2, "rows": 3, "accumulation": 2},
    {"tokens": 250, "context": 64, "rows": 1, "rope_theta": 1.0e6},  # 128 a step: 2 steps
]
"""Of steps 0 and 1, 2 and 3, 4 and 5."""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """60 documents of two kinds, 30 to 50 bytes long."""
    place = tmp_path_factory.mktemp("phases") / "shards"
    tokenizer = Tokenizer.load(data / "tokenizer")
    texts = [f"{n} times {n + 1} is {n * n + n}. " * 2 for n in range(60)]
    documents = [("ab"[n % 2], tokenizer.encode(text)) for n, text in enumerate(texts)]
    write_shards(
        place,
        documents,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text_id,
        tokenizer="bytes",
    )
    return place


@pytest.fixture
def phased(recipe: dict[str, Any], shards: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A recipe of 6 steps in three phases, with a checkpoint of each step."""
    monkeypatch.setattr("qwen2.train.stage.measure_matmul_peak", lambda *_: 1e12)
    del recipe["steps"]
    recipe["model"] |= {"max_position_embeddings": 32, "rope_theta": 10_000.0}
    kept = {"checkpoint_every": 1, "keep": 99}
    return recipe | kept | {"data": str(shards), "dtype": "fp32", "phases": PHASES}


def metrics(out: Path) -> list[dict[str, Any]]:
    """The metrics without what the clock says."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in x.items() if k not in ("tokens_per_s", "mfu", "memory_gb", "memory_gb")}
        for x in lines
    ]


def test_what_a_phase_does_not_say_stays_as_it_was() -> None:
    own = Linear()
    plan = lay_out(
        Stretch(0, 0, context=32, rows=2, accumulation=1),
        [
            Phase(steps=5),
            Phase(tokens=129, rows=4, schedule=own),
            Phase(steps=1, context=64, rope_theta=5.0),
            Phase(steps=2, accumulation=3),
        ],
    )
    assert plan == [
        Stretch(0, 5, 32, 2, 1),
        Stretch(5, 2, 32, 4, 1, schedule=own),
        Stretch(7, 1, 64, 4, 1, 5.0),
        Stretch(8, 2, 64, 4, 3, 5.0),
    ]
    assert cuts(plan) == [[0, 1], [2, 3]]


@given(
    st.integers(1, 12), st.integers(1, 24), st.integers(1, 6), st.integers(1, 6), st.integers(2, 64)
)
def test_ranks_share_a_step_evenly_or_are_refused(
    rows: int, accumulation: int, ranks: int, stages: int, context: int
) -> None:
    step = Stretch(0, 1, context, rows, accumulation)
    total = rows * accumulation
    if total % ranks:
        with pytest.raises(UserError, match=f"which {ranks} ranks cannot share evenly"):
            step.shared(ranks, stages)
    elif total // ranks < stages:
        with pytest.raises(UserError, match=f"{total // ranks} for each rank, too few for the"):
            step.shared(ranks, stages)
    else:
        own = step.shared(ranks, stages)
        assert own.step_tokens * ranks == step.step_tokens
        assert own.rows <= rows
        assert own.accumulation >= stages
        each = total // ranks
        larger = (n for n in range(own.rows + 1, rows + 1) if each % n == 0)
        assert all(each // n < stages for n in larger)


def test_a_schedule_runs_over_all_phases_without_their_own() -> None:
    """Steps 0 to 3 and 6 to 9 are a line of 8 steps; 4 and 5 are one of their own."""
    phases = [Phase(steps=4), Phase(steps=2, schedule=Linear(floor=0)), Phase(steps=4)]
    plan = lay_out(Stretch(0, 0, 8, 1, 1), phases)
    factors = [factor_at(plan, Linear(floor=0), step) for step in range(10)]
    eighths = [8, 7, 6, 5, 8, 4, 4, 3, 2, 1]
    assert factors == pytest.approx([n / 8 for n in eighths])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 3}, "phases: each has its steps or tokens"),
        ({"phases": [{"steps": 1}, {"rows": 1}]}, r"phases\.1: give either steps or tokens"),
        ({"phases": [{"steps": 1, "tokens": 9}]}, r"phases\.0: give either steps or tokens"),
        ({"phases": [{"steps": 1, "contxt": 9}]}, "did you mean 'context'"),
        ({"phases": [{"steps": 1, "context": 33}]}, "context exceeds model.max_position"),
        ({"phases": [{"steps": 1}, {"steps": 1, "weights": {"a": 1}}]}, "give the recipe's"),
        ({"phases": []}, "give either steps or tokens"),
    ],
)
def test_phases_that_cannot_be_are_refused(
    phased: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PretrainRecipe.parse(phased | change)


class Unlike:
    """Documents in which no token comes twice."""

    fingerprint = "unlike"

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)
        self._ends = np.cumsum(lengths)

    def document(self, number: int, /) -> NDArray[Any]:
        return np.arange(self._ends[number] - self.lengths[number], self._ends[number])


def read(loader: PhasedLoader) -> list[list[PackedBatch]]:
    """All batches of a plan, step by step."""
    steps = []
    for number, stretch in enumerate(loader.plan):
        loader.enter(number)
        for _ in range(stretch.steps):
            steps.append([next(loader) for _ in range(stretch.accumulation)])
    return steps


def targets(batches: list[PackedBatch]) -> list[int]:
    return [token for batch in batches for token in batch.targets.tolist() if token >= 0]


SIZES = st.lists(
    st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2)), min_size=1, max_size=4
)
"""Steps, rows, accumulation."""


@given(sizes=SIZES, packing=st.sampled_from(["stream", "best_fit"]))
def test_where_only_the_batch_changes_the_next_row_is_the_one_after_the_last(
    sizes: list[tuple[int, int, int]], packing: Any
) -> None:
    source = Unlike([7, 30, 12, 5, 21, 16, 9])
    phases = [Phase(steps=s, rows=r, accumulation=a) for s, r, a in sizes]
    plan = lay_out(Stretch(0, 0, 8, 1, 1), phases)
    whole = PackedLoader(source, 8, 1, seed=2, packing=packing)
    loader = PhasedLoader(plan, [PackedLoader(source, 8, 1, seed=2, packing=packing)])
    batches = [batch for step in read(loader) for batch in step]
    rows = sum(s * r * a for s, r, a in sizes)
    assert targets(batches) == targets([next(whole) for _ in range(rows)])


@given(
    sizes=SIZES,
    contexts=st.lists(st.sampled_from([8, 16, 24]), min_size=4, max_size=4),
    step=st.integers(0, 15),
    ranks=st.integers(1, 2),
)
def test_any_step_of_any_phase_can_be_looked_at(
    sizes: list[tuple[int, int, int]], contexts: list[int], step: int, ranks: int
) -> None:
    phases = [
        Phase(steps=s, rows=r, accumulation=a, context=context)
        for (s, r, a), context in zip(sizes, contexts, strict=False)
    ]
    plan = lay_out(Stretch(0, 0, 8, 1, 1), phases)
    source = Unlike([7, 30, 12, 5, 21, 16, 9] * 3)
    for rank in range(ranks):
        loaders = [
            PackedLoader(source, plan[group[0]].context, 1, 0, rank, ranks) for group in cuts(plan)
        ]
        steps = read(PhasedLoader(plan, loaders))
        step %= len(steps)
        seen = PhasedLoader(plan, loaders).before_step(step)
        assert targets([next(loader) for loader in seen]) == targets(steps[step])


def test_no_token_is_read_in_two_phases_of_one_epoch() -> None:
    """1,920 of 2,000 are read; in a phase, the row where its epoch ends has some of the next."""
    source = Unlike([20] * 100)
    phases = [Phase(steps=80), Phase(steps=20, context=32), Phase(steps=80, context=8)]
    plan = lay_out(Stretch(0, 0, 8, 1, 1), phases)
    parts = share_out(source, [stretch.steps * stretch.step_tokens for stretch in plan], seed=0)
    loaders = [PackedLoader(part, s.context, s.rows) for part, s in zip(parts, plan, strict=True)]
    steps = read(PhasedLoader(plan, loaders))
    by_phase = [
        targets([b for step in steps[s.first : s.first + s.steps] for b in step]) for s in plan
    ]
    assert sum(map(len, by_phase)) == 1920
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not set(by_phase[one]) & set(by_phase[other])
    for tokens, stretch in zip(by_phase, plan, strict=True):
        assert len(tokens) - len(set(tokens)) < stretch.context


def test_phases_have_their_own_weights(phased: dict[str, Any], shards: Path) -> None:
    phases = [{"steps": 20, "rows": 1}, {"steps": 20, "weights": {"b": 1}}]
    recipe = PretrainRecipe.parse(phased | {"weights": {"a": 3, "b": 1}, "phases": phases})
    loader = build_loader(recipe, Shards(shards))
    found = []
    for number in (0, 1):
        loader.enter(number)
        kinds = []
        for _ in range(20):
            piece = loader.current.row_pieces(loader.current.row)[0]
            source, local = loader.current.source, piece.document
            while not isinstance(source, Shards):
                source, local = source.beneath(local)  # type: ignore[attr-defined]
            kinds.append(source.index.kinds[source.kinds[local]])
            next(loader)
        found.append({kind: kinds.count(kind) for kind in "ab"})
    assert found == [{"a": 15, "b": 5}, {"a": 0, "b": 20}]
    phases[1]["weights"] = {"c": 1}
    wrong = PretrainRecipe.parse(phased | {"weights": {"a": 1}, "phases": phases})
    with pytest.raises(UserError, match="no source 'c'"):
        build_loader(wrong, Shards(shards))


def test_a_run_goes_through_its_phases(phased: dict[str, Any], shards: Path) -> None:
    """Each step's loss is that of the weights before it, on its batches, with its base."""
    recipe = PretrainRecipe.parse(phased)
    result = pretrain(recipe)
    assert result.model is not None
    assert recipe.model is not None
    assert (result.steps, result.finished) == (6, True)
    lines = metrics(recipe.out)
    assert [line["tokens"] for line in lines] == [64, 128, 320, 512, 640, 768]
    assert result.tokens == 768 == recipe.total_tokens
    exported = load_config(result.model)
    changes = {"rope_theta": 1e6, "max_position_embeddings": 64, "eos_token_id": [256]}
    assert exported == recipe.model.model_copy(update=changes)
    loader = build_loader(recipe, Shards(shards))
    for step, theta in ((1, 10_000.0), (2, 10_000.0), (4, 1e6), (5, 1e6)):
        model = Qwen2(recipe.model.model_copy(update={"rope_theta": theta}))
        checkpoint = recipe.out / "checkpoints" / f"step-{step:08d}"
        model.load_state_dict(tensors_in(checkpoint / "weights"), strict=False)
        batches = [next(at) for at in loader.before_step(step)]
        count = sum(len(batch.targets) for batch in batches)
        with torch.no_grad():
            loss = sum(PackedLoss(model)(batch, count).item() for batch in batches)
        assert lines[step]["loss"] == pytest.approx(loss, abs=1e-6), step


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint of one process."""
    return {n: t for file in folder.iterdir() for n, t in load_file(file).items()}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_anywhere_it_is_the_run_without_an_interruption(
    phased: dict[str, Any], tmp_path: Path, optimizer: str
) -> None:
    """At every step: before, at and after each boundary, and at the end before the export."""
    phased["optimizer"] = {"kind": optimizer, "lr": 0.01}
    straight = pretrain(PretrainRecipe.parse(phased))
    assert straight.checkpoint is not None
    assert straight.model is not None
    for step in range(1, 7):
        recipe = PretrainRecipe.parse(phased | {"out": str(tmp_path / f"from {step}")})
        name = f"step-{step:08d}"
        shutil.copytree(straight.checkpoint.with_name(name), recipe.out / "checkpoints" / name)
        shutil.copy(straight.metrics, recipe.out)
        resumed = pretrain(recipe)
        assert metrics(recipe.out) == metrics(straight.metrics.parent)
        assert resumed.checkpoint is not None
        assert resumed.model is not None
        for folder in ("weights", "optimizer"):
            found, expected = (tensors_in(r.checkpoint / folder) for r in (resumed, straight))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected), folder
        assert load_config(resumed.model) == load_config(straight.model)


def test_one_phase_is_a_run_without_phases(phased: dict[str, Any], tmp_path: Path) -> None:
    one = pretrain(PretrainRecipe.parse(phased | {"phases": [{"steps": 3}]}))
    plain = phased | {"phases": [], "steps": 3, "out": str(tmp_path / "plain")}
    two = pretrain(PretrainRecipe.parse(plain))
    assert metrics(one.metrics.parent) == metrics(two.metrics.parent)


def test_a_model_is_lengthened_but_never_shortened(small: ModelConfig) -> None:
    config = small.model_copy(
        update={"yarn": Yarn(factor=2, original_max_position_embeddings=32)}
    )  # 64 positions
    phases = [Phase(steps=1, context=c) for c in (16, 128, 64)]
    plan = lay_out(Stretch(0, 0, 16, 1, 1), phases)
    found = [config_of_phase(config, plan, number) for number in range(3)]
    assert found[0] == config
    assert [c.max_position_embeddings for c in found] == [64, 128, 128]
    assert [c.yarn is None for c in found] == [False, True, True]


def test_reconfigured_in_place_it_computes_as_if_built_so(
    new_trainee: Callable[..., Trainee],
) -> None:
    model = new_trainee().model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.mul_(50)  # attention that is not even, so that angles matter
    batch = torch.arange(30) % 61, torch.arange(30), model.packed([30])
    changes: dict[str, Any] = {"rope_theta": 50.0, "max_position_embeddings": 99}
    expected, before = with_config(model, **changes)(*batch), model(*batch)
    parameters = list(model.parameters())
    reconfigure(model, model.config.model_copy(update=changes))
    assert torch.equal(model(*batch), expected)
    assert (before - expected).abs().max() > 1e-4
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
