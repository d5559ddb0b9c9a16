"""Documents shared out: every one in one part, by tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from qwen2.tokens.loader import TokenSource
from qwen2.tokens.share_out import share_out


class Numbered:
    """Documents of given lengths; each is its own number, repeated."""

    fingerprint = "numbered"

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)

    def document(self, number: int, /) -> NDArray[Any]:
        return np.full(self.lengths[number], number)


def numbers(part: TokenSource) -> list[int]:
    return [int(part.document(i)[0]) for i in range(len(part.lengths))]


@given(
    lengths=st.lists(st.integers(1, 30), min_size=60, max_size=90),
    shares=st.lists(st.integers(3, 9), min_size=2, max_size=4),
    seed=st.integers(0, 99),
)
def test_every_document_is_in_one_part_and_parts_have_their_shares(
    lengths: list[int], shares: list[int], seed: int
) -> None:
    parts = share_out(Numbered(lengths), shares, seed)
    assert sorted(n for part in parts for n in numbers(part)) == list(range(len(lengths)))
    for part, share in zip(parts, shares, strict=True):
        wanted = sum(lengths) * share / sum(shares)
        assert abs(int(part.lengths.sum()) - wanted) < max(lengths)
    assert len({part.fingerprint for part in parts}) == len(parts)
    again = share_out(Numbered(lengths), shares, seed)
    assert [numbers(part) for part in parts] == [numbers(part) for part in again]


def test_a_part_without_a_share_has_nothing_and_another_seed_another_draw() -> None:
    source = Numbered([5] * 40)
    first, none, last = share_out(source, [1, 0, 1], seed=0)
    assert (len(first.lengths), len(none.lengths), len(last.lengths)) == (20, 0, 20)
    assert numbers(first) != numbers(share_out(source, [1, 0, 1], seed=1)[0])


def test_one_part_is_the_source_and_of_too_few_documents_all_are_all() -> None:
    source = Numbered([5, 7])
    assert share_out(source, [3], seed=0) == [source]
    assert share_out(source, [1, 1, 1], seed=0) == [source] * 3
    assert share_out(source, [0, 0], seed=0) == [source] * 2, "a kind that is not read"
