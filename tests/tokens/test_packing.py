import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from qwen2.tokens import EpochLayout, Piece, lay_epoch, pack, shuffled

LENGTHS = st.lists(st.integers(1, 20), min_size=1, max_size=15)


def documents(lengths: list[int]) -> list[np.ndarray]:
    """Documents whose every token is unlike any other, so that each can be told apart."""
    starts = np.cumsum([0, *lengths])
    return [np.arange(a, b, dtype=np.uint16) for a, b in itertools.pairwise(starts)]


def test_two_documents_by_hand() -> None:
    """Every token is a target; the end of a document is the input before its first token."""
    first, second = np.array([5, 6, 7, 0]), np.array([8, 0])
    batch = pack([Piece(0, 0, 2), Piece(0, 2, 4), Piece(1, 0, 2)], [first, second].__getitem__)
    assert batch.tokens.tolist() == [0, 5, 6, 7, 0, 8]
    assert batch.targets.tolist() == [5, 6, 7, 0, 8, 0]
    assert batch.positions.tolist() == [0, 1, 0, 1, 0, 1]
    assert batch.lengths == [2, 2, 2]


def test_layout_by_hand() -> None:
    """Documents 2, 0, 1 of 2, 5, 1 tokens in rows of 3: document 0 is cut twice."""
    layout = EpochLayout(order=np.array([2, 0, 1]), ends=np.array([2, 7, 8]))
    assert layout.pieces(0, 3) == [Piece(2, 0, 2), Piece(0, 0, 1)]
    assert layout.pieces(3, 6) == [Piece(0, 1, 4)]
    assert layout.pieces(6, 8) == [Piece(0, 4, 5), Piece(1, 0, 1)]
    assert layout.pieces(2, 2) == []


@given(LENGTHS, st.integers(0, 9), st.integers(0, 9), st.integers(1, 9))
def test_an_epoch_cut_anyhow_loses_and_repeats_nothing(
    lengths: list[int], seed: int, epoch: int, width: int
) -> None:
    source = documents(lengths)
    layout = lay_epoch(np.array(lengths), seed, epoch)
    total = sum(lengths)
    rows = [layout.pieces(a, min(a + width, total)) for a in range(0, total, width)]
    batch = pack([piece for row in rows for piece in row], source.__getitem__)

    for row, a in zip(rows, range(0, total, width), strict=True):
        assert sum(p.stop - p.start for p in row) == min(width, total - a)
    assert sorted(batch.targets.tolist()) == list(range(total))
    in_order = np.concatenate([source[i] for i in layout.order])
    assert batch.targets.tolist() == in_order.tolist()


@given(LENGTHS, st.integers(0, 9), st.integers(1, 9))
def test_positions_restart_and_inputs_never_cross_documents(
    lengths: list[int], seed: int, width: int
) -> None:
    source = documents(lengths)
    layout = lay_epoch(np.array(lengths), seed, 0)
    total = sum(lengths)
    cuts = [layout.pieces(a, min(a + width, total)) for a in range(0, total, width)]
    batch = pack([piece for row in cuts for piece in row], source.__getitem__)

    assert sum(batch.lengths) == total
    assert batch.positions.tolist() == [i for n in batch.lengths for i in range(n)]
    last_of = {int(document[0]): int(document[-1]) for document in source}
    for token, target in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        # Tokens count upwards in a document, so the true input before each is known.
        assert token == last_of.get(target, target - 1)


def test_order_changes_with_epoch_and_seed_and_is_pinned() -> None:
    lengths = np.ones(50, dtype=np.int64)
    orders = [lay_epoch(lengths, s, e).order.tolist() for s, e in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2] != orders[0]
    # A resumed run relies on this order, whatever the versions of numpy and of this package.
    assert lay_epoch(lengths[:8], 7, 3).order.tolist() == [2, 4, 7, 3, 5, 1, 0, 6]


@given(st.integers(1, 300), st.binary(max_size=8))
def test_shuffling_is_a_permutation(size: int, key: bytes) -> None:
    assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_shuffling_depends_on_the_key_and_is_pinned() -> None:
    order = [shuffled(i, 8, b"0/0") for i in range(8)]
    assert order != [shuffled(i, 8, b"0/1") for i in range(8)] != list(range(8))
    assert order == [6, 4, 3, 2, 0, 5, 7, 1]
    assert 0 <= shuffled(10**12, 2 * 10**12, b"") < 2 * 10**12
