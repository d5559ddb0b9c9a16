import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.tokens import PackedBatch, PackedLoader


@dataclass
class Memory:
    """Documents in memory; every token of the corpus has a number of its own."""

    sizes: list[int]
    fingerprint: str = "memory"
    lengths: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.array(self.sizes, dtype=np.int64)
        self.starts = np.cumsum([0, *self.sizes])

    def document(self, number: int) -> np.ndarray:
        return np.arange(self.starts[number], self.starts[number + 1], dtype=np.uint32)


SOURCE = st.builds(Memory, st.lists(st.integers(1, 30), min_size=1, max_size=12))
CONTEXT, ROWS, SEED = st.integers(1, 16), st.integers(1, 4), st.integers(0, 9)


def take(loader: PackedLoader, count: int) -> list[PackedBatch]:
    return list(itertools.islice(loader, count))


def assert_equal(ours: list[PackedBatch], theirs: list[PackedBatch]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.targets, b.targets)
        assert torch.equal(a.positions, b.positions)
        assert a.lengths == b.lengths


@given(SOURCE, CONTEXT, ROWS, SEED)
def test_every_epoch_has_every_token_once_and_rows_are_full(
    source: Memory, context: int, rows: int, seed: int
) -> None:
    total = int(source.lengths.sum())
    loader = PackedLoader(source, context, rows, seed)
    batches = take(loader, -(-4 * total // (context * rows)))
    for batch in batches:
        assert batch.tokens.shape == batch.targets.shape == (rows * context,)
        ends = set(itertools.accumulate(batch.lengths))
        assert set(range(context, rows * context + 1, context)) <= ends
    stream = torch.cat([batch.targets for batch in batches])
    for epochs in (1, 2, 3):  # the tail of one epoch and the head of the next share a row
        end = -(-epochs * total // context) * context
        counts = stream[:end].bincount(minlength=total)
        assert epochs <= int(counts.min()) <= int(counts.max()) <= epochs - (-context // total)
        assert int(counts.sum()) == end
    assert loader.epochs == pytest.approx(len(stream) / total)


def test_a_book_does_not_fill_one_batch_after_the_other() -> None:
    source = Memory([6400] + [64] * 100)
    loader = PackedLoader(source, context=64, rows=10, seed=0)
    for batch in take(loader, 20):
        from_the_book = int((batch.targets < 6400).sum()) // 64
        assert 1 <= from_the_book <= 9


@given(SOURCE, CONTEXT, ROWS, SEED, st.integers(0, 12), st.integers(1, 3))
def test_resumed_at_any_step_equals_never_interrupted(
    source: Memory, context: int, rows: int, seed: int, step: int, world: int
) -> None:
    for rank in range(world):
        whole = PackedLoader(source, context, rows, seed, rank, world)
        before = take(whole, step)
        state = whole.state_dict()
        after = take(whole, 4)

        resumed = PackedLoader(source, context, rows, seed, rank, world)
        resumed.load_state_dict(state)
        assert_equal(take(resumed, 4), after)
        assert_equal(take(PackedLoader(source, context, rows, seed, rank, world), step), before)


@given(SOURCE, CONTEXT, ROWS, SEED, st.integers(1, 4))
def test_ranks_take_the_rows_of_one_process_in_turn(
    source: Memory, context: int, rows: int, seed: int, world: int
) -> None:
    ranks = [PackedLoader(source, context, rows, seed, rank, world) for rank in range(world)]
    shared = [batch for _ in range(3) for loader in ranks for batch in take(loader, 1)]
    assert_equal(shared, take(PackedLoader(source, context, rows, seed), 3 * world))


@given(SOURCE, CONTEXT, st.integers(1, 3), SEED)
def test_resume_with_another_world_takes_up_the_next_rows(
    source: Memory, context: int, step: int, seed: int
) -> None:
    two = PackedLoader(source, context, 3, seed, rank=0, world_size=2)
    take(two, step)
    one = PackedLoader(source, context, 2, seed)
    one.load_state_dict(two.state_dict())
    alone = PackedLoader(source, context, 2, seed)
    take(alone, 3 * step)
    assert_equal(take(one, 3), take(alone, 3))


def test_a_state_of_other_data_is_refused() -> None:
    state = PackedLoader(Memory([5, 6]), 4, 2).state_dict()
    others = {
        "context": PackedLoader(Memory([5, 6]), 8, 2),
        "seed": PackedLoader(Memory([5, 6]), 4, 2, seed=1),
        "shards": PackedLoader(Memory([5, 6], "other"), 4, 2),
    }
    for name, loader in others.items():
        with pytest.raises(UserError, match=f"the saved state has {name}"):
            loader.load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"context": 0}, "context 0"),
        ({"rows": 0}, "rows 0"),
        ({"world_size": 0}, "world size 0"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"seed": -1}, "seed -1"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        PackedLoader(Memory([3]), **{"context": 4, "rows": 1, **arguments})
