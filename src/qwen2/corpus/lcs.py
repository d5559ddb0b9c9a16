"""The longest common subsequence of two sequences, exactly, 64 cells an operation.

Bit-parallel as in Crochemore, Iliopoulos, Pinzon and Reid (2001) and Hyyrö (2004): bit i of a
number stands for element i of one sequence and is 0 where the length over the first i + 1 elements
is one more than over the first i; each element of the other sequence updates all bits by one
addition. Python's integers are as long as the sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def positions(a: Sequence[int]) -> dict[int, int]:
    """Of each element, the set of its positions in `a` as bits."""
    found: dict[int, int] = {}
    for i, x in enumerate(a):
        found[x] = found.get(x, 0) | 1 << i
    return found


def lcs_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common subsequence; |a| |b| / 64 operations."""
    known = positions(a)
    return length_of([known[x] for x in b if x in known], len(a))


def length_of(matches: Iterable[int], size: int) -> int:
    """The same for a sequence of `size`, given its positions of each element of the other.

    Elements that it does not have may be left out.
    """
    row = (1 << size) - 1
    for match in matches:
        both = row & match
        row = (row + both) | (row - both)
    return size - (row & ((1 << size) - 1)).bit_count()


def lcs_pairs(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """One longest common subsequence as places (i, j) with a[i] == b[j], ascending."""
    known: Mapping[int, int] = positions(a)
    rows = [(1 << len(a)) - 1]
    for x in b:
        both = rows[-1] & known.get(x, 0)
        rows.append((rows[-1] + both) | (rows[-1] - both))
    pairs = []
    i, j = len(a), len(b)
    while i and j:
        if rows[j] >> (i - 1) & 1:  # a[i - 1] adds nothing
            i -= 1
        elif rows[j - 1] >> (i - 1) & 1:  # it adds with b[j - 1] and not before
            i, j = i - 1, j - 1
            pairs.append((i, j))
        else:
            j -= 1
    return pairs[::-1]
