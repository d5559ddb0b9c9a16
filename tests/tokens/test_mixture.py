"""The algebra of the mixture: its share, what it keeps, and that it is the same each time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen2.tokens import LongMixture, PackedLoader
from qwen2.tokens.mixture import copies


@dataclass
class Memory:
    """Documents whose tokens are all their number."""

    sizes: list[int]
    fingerprint: str = "memory"
    lengths: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.array(self.sizes, dtype=np.int64)

    def document(self, number: int, /) -> NDArray[Any]:
        return np.full(self.lengths[number], number)


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=30)
SHARE = st.floats(0.05, 0.95)


def numbers(mixture: LongMixture) -> list[int]:
    """The document of the source at each place."""
    return [int(mixture.document(i)[0]) for i in range(len(mixture.lengths))]


def test_by_hand() -> None:
    """Short 10 and 2, long 20 and 30; a share of 0.9 is 108 tokens: two times both and 8 more."""
    mixture = LongMixture(Memory([10, 20, 2, 30]), long_tokens=20, long_share=0.9)
    counts = Counter(numbers(mixture))
    assert (counts[0], counts[2]) == (1, 1)
    assert sorted((counts[1], counts[3])) == [2, 3]
    assert mixture.long_documents == 2
    assert mixture.long_tokens in (120, 130)
    assert mixture.repeats == mixture.long_tokens / 50


def test_copies_by_hand() -> None:
    assert copies(np.array([5, 5]), 20).tolist() == [2, 2]
    assert sorted(copies(np.array([5, 5]), 21).tolist()) == [2, 3]
    assert copies(np.array([5, 5]), 26).tolist() == [3, 3]
    assert copies(np.array([5, 5]), 3).tolist() == [1, 1], "enough is there: as it was"
    assert copies(np.array([], np.int64), 3).tolist() == []


@given(SIZES, st.integers(1, 45), SHARE)
def test_the_share_is_reached_within_one_document(
    sizes: list[int], least: int, share: float
) -> None:
    source = Memory(sizes)
    mixture = LongMixture(source, least, share)
    counts = Counter(numbers(mixture))
    assert set(counts) == set(range(len(sizes))), "nothing is dropped"
    assert all(counts[i] == 1 for i, size in enumerate(sizes) if size < least)
    long = [i for i, size in enumerate(sizes) if size >= least]
    assert (
        max((counts[i] for i in long), default=1) <= min((counts[i] for i in long), default=1) + 1
    )
    tokens = sum(counts[i] * sizes[i] for i in long)
    assert (mixture.long_documents, mixture.long_tokens) == (len(long), tokens)
    assert mixture.tokens == mixture.lengths.sum()
    short = mixture.tokens - tokens
    if tokens > sum(sizes[i] for i in long):
        longest = max(sizes[i] for i in long)
        assert mixture.long_share >= share - 1e-9
        assert (tokens - longest) / (tokens - longest + short) < share + 1e-9
    elif long:
        assert mixture.long_share >= share - 1e-9, "it was reached before"
    else:
        assert mixture.long_share == 0
        assert mixture.repeats == 1


@given(SIZES, st.integers(1, 45), SHARE, st.integers(1, 16), st.integers(0, 3))
def test_it_is_the_same_each_time(
    sizes: list[int], least: int, share: float, context: int, steps: int
) -> None:
    one, two = (LongMixture(Memory(sizes), least, share) for _ in range(2))
    assert numbers(one) == numbers(two)
    assert one.fingerprint == two.fingerprint
    straight, resumed = PackedLoader(one, context, 2), PackedLoader(two, context, 2)
    for _ in range(steps):
        next(straight)
    resumed.load_state_dict(straight.state_dict())
    assert next(straight).targets.equal(next(resumed).targets)


@given(SIZES, st.integers(1, 45), SHARE, st.integers(1, 16))
def test_every_token_of_every_document_is_a_target(
    sizes: list[int], least: int, share: float, context: int
) -> None:
    mixture = LongMixture(Memory(sizes), least, share)
    loader = PackedLoader(mixture, context, 1)
    seen: Counter[int] = Counter()
    rows = -(-mixture.tokens // context)
    for _ in range(rows):
        seen.update(next(loader).targets.tolist())
    counts = Counter(numbers(mixture))
    for number, size in enumerate(sizes):  # the last row takes the first of the next epoch along
        assert seen[number] >= counts[number] * size


def test_where_nothing_is_to_be_done_the_documents_are_as_they_were() -> None:
    for source, least in ((Memory([3, 4, 5]), 6), (Memory([3, 9, 9]), 6), (Memory([7, 8]), 6)):
        mixture = LongMixture(source, least, 0.7)
        assert numbers(mixture) == list(range(len(source.sizes)))
        assert mixture.repeats == 1


@pytest.mark.parametrize(("least", "share"), [(6, 0.7), (5, 0.8)])
def test_other_settings_are_other_data(least: int, share: float) -> None:
    """So that a run never resumes at a place in another mixture."""
    source = Memory([3, 9])
    fingerprint = LongMixture(source, least, share).fingerprint
    assert fingerprint != LongMixture(source, 5, 0.7).fingerprint
    assert fingerprint != LongMixture(Memory([3, 9], "other"), least, share).fingerprint
