"""A run goes on with other ranks and other rows at the very next row, however it is packed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.tokens.memory import Memory

from qwen2.common.errors import UserError
from qwen2.tokens import PackedLoader, Packing, WeightedLoader

CONTEXT = 8
LENGTHS = (np.arange(1, 60) * 31 % 17 + 1).tolist()
SOURCES = {"a": Memory(LENGTHS[:30]), "b": Memory(LENGTHS[30:40], 1000), "c": Memory([9, 2], 5000)}
WEIGHTS = {"a": 0.5, "b": 0.3, "c": 0.2}

Make = Callable[..., PackedLoader]


def plain(packing: Packing) -> Make:
    return lambda rows, rank=0, world=1: PackedLoader(
        SOURCES["a"], CONTEXT, rows, 5, rank, world, packing
    )


def weighted(packing: Packing) -> Make:
    return lambda rows, rank=0, world=1: WeightedLoader(
        SOURCES, WEIGHTS, CONTEXT, rows, 5, rank, world, packing
    )


MAKE = pytest.mark.parametrize(
    "make",
    [kind(packing) for kind in (plain, weighted) for packing in ("stream", "best_fit")],
    ids=["stream", "best fit", "weighted stream", "weighted best fit"],
)


def row_list(loader: PackedLoader, batches: int) -> list[list[Any]]:
    """Each row of some batches: tokens, targets, positions."""
    rows = []
    for batch in itertools.islice(loader, batches):
        tensors = (batch.tokens, batch.targets, batch.positions)
        for row in zip(*(t.reshape(-1, CONTEXT).tolist() for t in tensors), strict=True):
            rows.append(list(row))
    return rows


def in_turn(make: Make, rows: int, world: int, batches: int, state: Any = None) -> Any:
    """The rows of all ranks in the order of their places, and the state of each rank."""
    ranks = [make(rows, rank, world) for rank in range(world)]
    for rank in ranks if state is not None else []:
        rank.load_state_dict(state)
    taken = [row for _ in range(batches) for rank in ranks for row in row_list(rank, 1)]
    return taken, [rank.state_dict() for rank in ranks]


@MAKE
@settings(max_examples=40)
@given(data=st.data())
def test_any_ranks_and_rows_go_on_where_any_others_stopped(make: Make, data: Any) -> None:
    shapes = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5))
    plan = data.draw(st.lists(shapes, min_size=1, max_size=4))
    state, together = None, []
    for world, rows, batches in plan:
        taken, states = in_turn(make, rows, world, batches, state)
        assert all(each == states[0] for each in states), "the state is the same on all ranks"
        state = json.loads(json.dumps(states[0]))
        together += taken
    alone = make(1)
    assert together == row_list(alone, len(together))
    assert state == alone.state_dict()


@MAKE
def test_ranks_share_no_row_and_leave_none_out_of_an_epoch(make: Make) -> None:
    """Every place once: checked by the places themselves, for rows of equal content may recur."""
    seen: list[int] = []
    ranks = [make(3, rank, 4) for rank in range(4)]
    for rank in ranks:
        pieces = rank.row_pieces

        def note(place: int, pieces: Callable[[int], Any] = pieces) -> Any:
            seen.append(place)
            return pieces(place)

        rank.row_pieces = note  # type: ignore[method-assign]
        next(rank), next(rank)
    assert sorted(seen) == list(range(24))


def test_other_packing_does_not_resume_but_a_state_from_before_there_was_one_does() -> None:
    stream, best_fit = plain("stream"), plain("best_fit")
    for one, other in ((stream, best_fit), (best_fit, stream)):
        with pytest.raises(UserError, match="packing"):
            other(2).load_state_dict(one(2).state_dict())
    state = stream(2).state_dict()
    del state["packing"]
    stream(2).load_state_dict(state)
    with pytest.raises(UserError, match="packing"):
        best_fit(2).load_state_dict(state)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_weights_hold_however_it_is_packed(packing: Packing) -> None:
    rows = np.array([row[1][0] for row in row_list(weighted(packing)(64), 64)])
    shares = [(rows < 1000).mean(), ((rows >= 1000) & (rows < 5000)).mean(), (rows >= 5000).mean()]
    assert shares == pytest.approx(list(WEIGHTS.values()), abs=1 / 4096)


def test_a_source_without_documents_is_named() -> None:
    with pytest.raises(UserError, match="without documents"):
        PackedLoader(Memory([]), 4, 1)
