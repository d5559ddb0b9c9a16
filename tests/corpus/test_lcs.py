import itertools

from hypothesis import given
from hypothesis import strategies as st

from qwen2.corpus.lcs import lcs_length, lcs_pairs

SEQUENCES = st.lists(st.integers(0, 5), max_size=90)


def table(a: list[int], b: list[int]) -> int:
    """The textbook's table, cell by cell."""
    row = [0] * (len(b) + 1)
    for x in a:
        above, row = row, [0] * (len(b) + 1)
        for j, y in enumerate(b):
            row[j + 1] = above[j] + 1 if x == y else max(above[j + 1], row[j])
    return row[-1]


@given(SEQUENCES, SEQUENCES)
def test_equals_the_table(a: list[int], b: list[int]) -> None:
    expected = table(a, b)
    assert lcs_length(a, b) == expected
    pairs = lcs_pairs(a, b)
    assert len(pairs) == expected
    assert all(a[i] == b[j] for i, j in pairs)
    assert all(p[0] < q[0] and p[1] < q[1] for p, q in itertools.pairwise(pairs))


def test_by_hand() -> None:
    assert lcs_length([1, 2, 3, 4, 1], [3, 4, 1, 2, 1, 3]) == 3
    assert lcs_pairs([1, 2, 3], [0, 1, 9, 3]) == [(0, 1), (2, 3)]
    assert lcs_length([], [1]) == lcs_length([1], []) == 0
    assert lcs_pairs([], [1]) == []
    assert lcs_length(list(range(500)), list(range(500))) == 500
    assert lcs_length(list(range(500)), list(range(500))[::-1]) == 1
