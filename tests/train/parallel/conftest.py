"""Ranks for the tests of parallelism."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from ranks import Function, Ranks

MOST_CALLS = 6
"""Functions that ranks run before others take their place: each makes some twenty groups, whose
threads stay and are never idle."""

RunInRanks = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def in_ranks() -> Iterator[RunInRanks]:
    """Runs a function of a test's module in so many ranks: in_ranks(2, function, *args)."""
    groups: dict[int, Ranks] = {}

    def run(count: int, function: Function, *args: Any) -> list[Any]:
        if count in groups and groups[count].calls == MOST_CALLS:
            groups.pop(count).end()
        if count not in groups:
            groups[count] = Ranks(count)
        try:
            return groups[count].run(function, *args)
        except BaseException:
            groups.pop(count).end()  # its ranks may wait for each other
            raise

    yield run
    for group in groups.values():
        group.end()
