"""Repeated measurements in few numbers."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

DIGITS = 4


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, least and greatest."""
    values = list(values)
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, DIGITS) for name, value in figures.items()}


def percentile(values: Sequence[float], percent: float) -> float:
    """What `percent` of the values do not exceed, by the straight line between neighbours."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Mean, p50 and p99, as servers are judged by; empty if there are no values."""
    if not values:
        return {}
    figures = {
        "mean": statistics.fmean(values),
        "p50": percentile(values, 50),
        "p99": percentile(values, 99),
    }
    return {name: round(value, DIGITS + 2) for name, value in figures.items()}
