"""RegMix's published runs, as far as they are kept here: see data/regmix/README.md."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

RUNS = Path(__file__).parent / "data" / "regmix" / "runs.csv"
SOURCES = 17

Floats = NDArray[np.float64]


def read_runs() -> dict[str, tuple[Floats, Floats]]:
    """Mixtures (N, 17) and losses (N, 4), Pile-CC's first, of `train_1m`, `test_1m`, `test_1b`.

    Published weights are rounded to three digits; here they sum to 1 again.
    """
    with RUNS.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    runs = {}
    for name in dict.fromkeys(row[0] for row in rows):
        values = np.array([[float(cell) for cell in row[1:]] for row in rows if row[0] == name])
        mixtures = values[:, :SOURCES]
        runs[name] = (mixtures / mixtures.sum(axis=1, keepdims=True), values[:, SOURCES:])
    return runs
