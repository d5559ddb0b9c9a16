"""Rows by weight: the shares, every source whole, and resuming as with one source."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen2.common.errors import UserError
from qwen2.tokens import WeightedLoader
from qwen2.tokens.weighted import BLOCK, Subset, quotas, spread_evenly


@dataclass
class Memory:
    """Documents whose tokens are all their number, from `first` on."""

    sizes: list[int]
    first: int = 0
    fingerprint: str = "memory"
    lengths: NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self.lengths = np.array(self.sizes, dtype=np.int64)

    def document(self, number: int, /) -> NDArray[Any]:
        return np.full(self.lengths[number], self.first + number)


SOURCES = {"a": Memory([3, 5, 7, 2], 0), "b": Memory([9, 1], 100), "c": Memory([4] * 6, 200)}


def loader(weights: dict[str, float], rows: int = 4, **more: int) -> WeightedLoader:
    return WeightedLoader(SOURCES, weights, context=5, rows=rows, seed=1, **more)


def taken(of: WeightedLoader, batches: int) -> list[list[int]]:
    return [next(of).targets.tolist() for _ in range(batches)]


def test_quotas_by_hand() -> None:
    """Thirds of 4,096: the odd place goes to the first; nothing above 0 is left without a place."""
    assert quotas(np.array([1.0, 1.0, 1.0])).tolist() == [1366, 1365, 1365]
    assert quotas(np.array([3.0, 1.0])).tolist() == [3072, 1024]
    assert quotas(np.array([1.0, 1e-9])).tolist() == [4095, 1]


def test_spread_by_hand() -> None:
    """Three and one: a a b a."""
    sources, numbers = spread_evenly(np.array([3, 1]))
    assert sources.tolist() == [0, 0, 1, 0]
    assert numbers.tolist() == [0, 1, 0, 2]


@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=12), st.integers(1, BLOCK))
def test_any_stretch_from_the_start_has_the_shares(weights: list[float], stretch: int) -> None:
    places = quotas(np.array(weights))
    assert places.sum() == BLOCK
    assert (places >= 1).all()
    if min(weights) / sum(weights) > 1 / BLOCK:
        assert np.abs(places / BLOCK - np.array(weights) / sum(weights)).max() <= 1 / BLOCK
    sources, numbers = spread_evenly(places)
    for index, count in enumerate(places):
        assert (numbers[sources == index] == np.arange(count)).all()
        here = int((sources[:stretch] == index).sum())
        assert abs(here - stretch * count / BLOCK) <= len(weights)


def test_a_batch_has_its_shares_and_no_other_source() -> None:
    of = loader({"a": 3, "b": 1, "c": 0}, rows=8)
    batch = next(of)
    owners = Counter(int(token) // 100 for token in batch.targets.reshape(8, 5)[:, 0])
    assert owners == {0: 6, 1: 2}
    assert of.weights == {"a": 3, "b": 1}


def test_every_source_is_read_whole_again_and_again() -> None:
    """a has 17 tokens: 17 rows of 5 are five epochs, each token five times."""
    of = loader({"a": 1, "b": 1}, rows=34)
    seen = Counter(next(of).targets.tolist())
    assert {number: seen[number] for number in range(4)} == {0: 15, 1: 25, 2: 35, 3: 10}


def test_ranks_share_the_rows_and_a_resumed_run_goes_on() -> None:
    weights = {"a": 0.5, "b": 0.2, "c": 0.3}
    whole = taken(loader(weights, rows=6), 4)
    ranks = [loader(weights, rows=3, rank=rank, world_size=2) for rank in (0, 1)]
    parts = [taken(each, 4) for each in ranks]
    assert [one + two for one, two in zip(*parts, strict=True)] == whole
    stopped = loader(weights, rows=6)
    taken(stopped, 2)
    resumed = loader(weights, rows=6)
    resumed.load_state_dict(stopped.state_dict())
    assert taken(resumed, 2) == whole[2:]


def test_other_weights_do_not_resume() -> None:
    state = loader({"a": 0.5, "b": 0.5}).state_dict()
    with pytest.raises(UserError, match="weights"):
        loader({"a": 0.6, "b": 0.4}).load_state_dict(state)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"d": 1.0}, "no source 'd'; there are a, b, c"),
        ({"a": -0.1}, "a has -0.1"),
        ({"a": float("nan")}, "a has nan"),
        ({"a": 0.0}, "none is above 0"),
    ],
)
def test_weights_that_cannot_be(weights: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        loader(weights)


def test_a_subset_is_its_documents() -> None:
    some = Subset(SOURCES["a"], np.array([2, 0]), "some")
    assert some.lengths.tolist() == [7, 3]
    assert some.document(0).tolist() == [2] * 7
    assert some.fingerprint != SOURCES["a"].fingerprint
