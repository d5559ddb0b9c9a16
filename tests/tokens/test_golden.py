"""Batches that runs of former versions were trained on: a resumed run relies on them."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
from tests.tokens.memory import Memory

from qwen2.tokens import PackedLoader, WeightedLoader

SIZES = (np.arange(1, 400) * 7919 % 97 + 1).tolist()


def digest(loader: PackedLoader, batches: int) -> str:
    """A hash of all that a number of batches hold."""
    running = hashlib.sha256()
    for batch in itertools.islice(loader, batches):
        for tensor in (batch.tokens, batch.targets, batch.positions):
            running.update(tensor.numpy().astype("<i8").tobytes())
        running.update(repr(batch.lengths).encode())
    return running.hexdigest()[:16]


def test_stream_of_two_epochs() -> None:
    loader = PackedLoader(Memory(SIZES), context=64, rows=3, seed=11, rank=1, world_size=2)
    assert digest(loader, 110) == "f5e8c3de5dc397de"


def test_weighted_streams() -> None:
    sources = {"a": Memory(SIZES[:100]), "b": Memory(SIZES[100:140], 10_000)}
    loader = WeightedLoader(sources, {"a": 0.3, "b": 0.7}, context=32, rows=5, seed=2)
    assert digest(loader, 60) == "7490dce88c3e506f"
