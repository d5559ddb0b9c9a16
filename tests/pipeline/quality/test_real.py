"""The real checkpoint knows prose from the same words in disorder, without any label."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from qwen2.corpus.quality.config import Extent
from qwen2.model.hub import load
from qwen2.pipeline.quality.reading import Reader

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROSE = [
    "The moon has no light of its own; what we see of it at night is light of the sun.",
    "Der Mond hat kein eigenes Licht; was wir nachts von ihm sehen, ist das Licht der Sonne.",
    "La lune n'a pas de lumière propre; ce que nous en voyons la nuit vient du soleil.",
]


def test_disorder_costs_bits(real_checkpoint: Path) -> None:
    shuffled = [" ".join(random.Random(0).sample(t.split(), len(t.split()))) for t in PROSE]
    reader = Reader(*load(real_checkpoint, dtype="fp32", inference=True), Extent(tokens=64))
    found = reader.read([*PROSE, *shuffled])
    assert (found.bits_per_byte[3:] > 1.3 * found.bits_per_byte[:3]).all()
