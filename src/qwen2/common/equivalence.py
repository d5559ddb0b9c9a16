"""Equivalence by two one-sided tests (Schuirmann 1987): whether a difference is shown to be small.

A test of the null hypothesis "no difference" that does not reject says nothing: three noisy runs
never reject. To claim, as report section 3.1 does of 12T against 7T tokens, that two things are
equally good, the difference has to be shown to lie within a margin that is stated beforehand: both
"it is at most -margin" and "it is at least +margin" must be rejected. That is so exactly when the
interval of confidence 1 - 2 alpha of the mean lies within the margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from qwen2.common.errors import UserError


@dataclass(frozen=True)
class Equivalence:
    """The result for paired differences."""

    mean: float
    error: float
    """Standard error of the mean."""
    low: float
    high: float
    """Interval of confidence 1 - 2 alpha."""
    margin: float
    p: float
    """The larger of the two one-sided p values; equivalent when below alpha."""
    p_different: float
    """Two-sided, of the null hypothesis that there is no difference at all."""
    equivalent: bool
    """Shown to be within the margin. False is not the contrary: see `low` and `high`."""


def equivalence(
    one: Sequence[float], other: Sequence[float], margin: float, alpha: float = 0.05
) -> Equivalence:
    """Test whether one - other, in pairs of one seed, is on average within (-margin, margin).

    Raises:
        UserError: fewer than three pairs, unequal numbers, or a margin that is not above 0.
    """
    if len(one) != len(other) or len(one) < 3:
        raise UserError(f"equivalence: {len(one)} and {len(other)} runs; give pairs, at least 3")
    if not margin > 0:
        raise UserError(f"equivalence: margin {margin}; it must be above 0")
    differences = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    n = len(differences)
    mean = float(differences.mean())
    error = float(differences.std(ddof=1)) / math.sqrt(n)
    reach = t_quantile(1 - alpha, n - 1) * error

    def tail(distance: float) -> float:
        """Probability of a mean that lies further above its expectation than `distance`."""
        if error == 0:  # no noise at all: certain either way
            return 0.0 if distance > 0 else 1.0
        return 1 - t_probability(distance / error, n - 1)

    p = max(tail(mean + margin), tail(margin - mean))
    different = min(1.0, 2 * tail(abs(mean)))
    return Equivalence(mean, error, mean - reach, mean + reach, margin, p, different, p < alpha)


def t_probability(t: float, freedom: int) -> float:
    """P(T <= t) of Student's distribution.

    With T = sqrt(freedom) tan(angle) its density becomes that of cos^(freedom - 1) on a finite
    interval, which 100 Gauss-Legendre points integrate to 1e-12 below some thousand degrees.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    points, weights = _quadrature()
    angles = (points + 1) / 2 * angle
    area = float((weights * np.cos(angles) ** (freedom - 1)).sum()) * angle / 2
    log_norm = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)
    part = area * math.exp(log_norm) / math.sqrt(math.pi)
    return 0.5 + math.copysign(min(part, 0.5), t)


@cache
def _quadrature() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.polynomial.legendre.leggauss(100)


def t_quantile(probability: float, freedom: int) -> float:
    """The t with P(T <= t) = `probability`, which is above one half and below 1."""
    assert 0.5 < probability < 1, probability
    low, high = 0.0, 1.0
    while t_probability(high, freedom) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if t_probability(middle, freedom) < probability else (low, middle)
        )
    return (low + high) / 2
