"""Best-fit packing: that it is best-fit decreasing, loses nothing, and cuts and pads little."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tokens.memory import Memory

from qwen2.tokens import BestFitPlan, PackedLoader
from qwen2.tokens.best_fit import PADDING, BestFitRows, best_fit_decreasing
from qwen2.tokens.packing import IGNORE, NOTHING, Piece, pack

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)
CONTEXT = st.integers(2, 24)


def one_by_one(sizes: list[int], context: int) -> list[int]:
    """Room of the bins when each item in turn goes into the fullest bin with room for it."""
    rooms: list[int] = []
    for size in sizes:
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else context) - size)
    return sorted(rooms)


def epoch_of(rows: BestFitRows, epoch: int) -> list[list[Piece]]:
    count = rows.plan.rows
    return [rows.pieces(place) for place in range(epoch * count, (epoch + 1) * count)]


@given(st.lists(st.integers(1, 15), max_size=80))
def test_by_counts_is_as_one_by_one(sizes: list[int]) -> None:
    context = 16
    sizes.sort(reverse=True)
    bins = best_fit_decreasing(np.bincount(sizes, minlength=context), context)
    used = np.bincount(bins, sizes) if sizes else np.empty(0)
    assert sorted((context - used).tolist()) == one_by_one(sizes, context)


def test_sizes_by_hand() -> None:
    """7 and 3 fill a bin of 10, and so do 6 and 4 and 2, 2, 2, 2, 2; nothing is left over."""
    counts = np.bincount([7, 3, 6, 4, 2, 2, 2, 2, 2], minlength=10)
    assert best_fit_decreasing(counts, 10).tolist() == [0, 1, 1, 0, 2, 2, 2, 2, 2]


def test_rows_by_hand() -> None:
    """25 tokens give two rows and 5 more, which go with 3 and 2; 7 and 1 leave 2 to padding."""
    rows = BestFitRows(np.array([25, 3, 2, 7, 1]), context=10, seed=0)
    plan = rows.plan
    assert (plan.full, plan.rows, plan.items, plan.cuts, plan.padding) == (2, 4, 5, 0, 2)
    assert sorted(epoch_of(rows, 0)) == [
        [(0, 0, 10)],
        [(0, 10, 20)],
        [(0, 20, 25), (2, 0, 2), (4, 0, 1), (NOTHING, 0, 2)],
        [(3, 0, 7), (1, 0, 3)],
    ]


def test_where_short_documents_lack_rows_are_dissolved_by_hand() -> None:
    """Of 5 documents of 6, four have a row of 10 each; the fifth is cut into the room of two.

    Of 500, 3,000 tokens are 304 rows with 1 % of padding: 196 documents are laid into rooms of 4,
    293 times across an end, which is that of a document, too, after every 12 tokens.
    """
    rows = BestFitRows(np.full(5, 6), context=10, seed=0)
    assert (rows.plan.rows, rows.plan.padding, rows.plan.cuts) == (4, 10, 1)
    many = BestFitRows(np.full(500, 6), context=10, seed=0)
    assert (many.plan.rows, many.plan.padding, many.plan.cuts) == (304, 40, 293 - 97)


@given(LENGTHS, CONTEXT, st.integers(0, 9), st.integers(0, 3))
def test_an_epoch_has_every_token_once_in_full_rows(
    lengths: list[int], context: int, seed: int, epoch: int
) -> None:
    source = Memory(lengths)
    rows = BestFitRows(source.lengths, context, seed)
    laid = epoch_of(rows, epoch)
    assert all(sum(p.stop - p.start for p in row) == context for row in laid)
    assert all(p.document != NOTHING for row in laid for p in row[:-1])
    batch = pack(itertools.chain.from_iterable(laid), source.document)
    real = batch.targets[batch.targets != IGNORE]
    assert sorted(real.tolist()) == list(range(sum(lengths)))
    assert len(batch.targets) - len(real) == rows.plan.padding
    assert rows.plan.padding <= PADDING * len(batch.targets) + context

    own = Counter(p.document for row in laid for p in row if p.document != NOTHING)
    needed = Counter({i: -(-length // context) for i, length in enumerate(lengths)})
    assert sum((own - needed).values()) == rows.plan.cuts
    assert not needed - own


@given(LENGTHS, CONTEXT)
def test_every_epoch_has_the_same_rows_by_size(lengths: list[int], context: int) -> None:
    rows = BestFitRows(np.array(lengths), context, seed=0)

    def sizes(epoch: int) -> list[tuple[int, ...]]:
        laid = epoch_of(rows, epoch)
        return sorted(tuple(sorted(p.stop - p.start for p in row)) for row in laid)

    assert sizes(0) == sizes(1) == sizes(5)


def test_documents_of_one_size_are_shuffled_by_epoch_and_seed_and_pinned() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        rows = BestFitRows(np.ones(12, np.int64), context=4, seed=seed)
        return [p.document for row in epoch_of(rows, epoch) for p in row]

    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert all(sorted(each) == list(range(12)) for each in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    # A resumed run relies on this order, whatever the versions of numpy and of this package.
    assert order(7, 3) == [7, 3, 5, 1, 11, 2, 10, 4, 8, 9, 0, 6]


def test_padding_is_the_end_of_text_and_is_not_predicted() -> None:
    documents = [np.array([5, 6, 0]), np.array([7, 0])]
    batch = pack([Piece(0, 0, 3), Piece(NOTHING, 0, 2), Piece(1, 0, 2)], documents.__getitem__)
    assert batch.tokens.tolist() == [0, 5, 6, 0, 0, 0, 7]
    assert batch.targets.tolist() == [5, 6, 0, IGNORE, IGNORE, 7, 0]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 0, 1]
    assert batch.lengths == [3, 2, 2]


def test_fewer_cuts_than_the_stream_on_lengths_as_they_are() -> None:
    random = np.random.default_rng(0)
    lengths = np.ceil(np.exp(random.normal(6.3, 1.2, 20_000))).astype(np.int64)
    context = 2048
    plan = BestFitPlan(lengths, context)
    short = int((lengths <= context).sum())
    assert plan.cuts < 0.002 * short
    assert plan.padding < 0.002 * lengths.sum()
    stream = PackedLoader(Memory(lengths.tolist()), context, 1)
    rows = int(lengths.sum()) // context
    cut = sum(p.start > 0 for place in range(rows) for p in stream.row_pieces(place)[:1])
    assert cut > 0.9 * rows > 20 * plan.cuts


@pytest.mark.parametrize("lengths", [[8, 16], [8], [16, 24, 8]])
def test_documents_that_fill_rows_exactly(lengths: list[int]) -> None:
    rows = BestFitRows(np.array(lengths), context=8, seed=0)
    assert rows.plan.rows == sum(lengths) // 8
    assert (rows.plan.items, rows.plan.padding) == (0, 0)
    assert all(len(row) == 1 for row in epoch_of(rows, 1))
