"""The mixture that a law predicts to be best, and how sure that is.

The loss of a mixture is the mean of its predicted losses over the targets, by their importance.
Under the exponential law it is convex in the mixture, so descent finds the one minimum; but the
minimum of a noisy fit lies too far out. So many mixtures are drawn within the bounds, around the
natural one and around the minimum, and the best of them averaged, as RegMix does; and this for
every bootstrap of the proxies, whose choices are averaged again. The bounds are convex, so the
average is within them, and where the true loss is convex too it is no worse than the choices are on
average. Over the same bootstraps the gain that is predicted has its spread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen2.corpus.mixing_law import ExponentialLaw, Law
from qwen2.corpus.mixture import CONCENTRATIONS, Bounds, centre_of

Floats = NDArray[np.float64]

CANDIDATES = 20_000
AVERAGED = 100  # of them
NEAR = (20.0, 200.0)  # concentrations of the candidates around the minimum
DESCENT_STEPS = 500


@dataclass(frozen=True)
class Gain:
    """By how much a mixture is better than another, in the units of the loss."""

    expected: float
    low: float
    """5 % of the bootstraps are below it."""
    high: float
    """5 % are above."""


@dataclass(frozen=True)
class Choice:
    """A mixture and what is predicted of it."""

    weights: Floats
    """(D,)"""
    minimum: Floats
    """(D,) where the fitted law itself is least; the weights for a law without a gradient."""
    predicted: Floats
    """(K,) losses."""
    gains: dict[str, Gain]
    """Against each of the mixtures it was compared with."""


def choose(
    law: Law,
    bounds: Bounds,
    prior: Floats,
    importance: Floats,
    rivals: dict[str, Floats],
    bootstraps: Sequence[Law] = (),
    seed: int = 0,
) -> Choice:
    """The best mixture within `bounds`.

    Args:
        prior: (D,) mixture that candidates are drawn around.
        importance: (K,) of the targets; normalised here.
        rivals: mixtures (D,) to state the gain against.
        bootstraps: laws of resampled proxies; without them a gain has no spread, and the choice is
            by `law` alone.
    """
    weighing = importance / importance.sum()
    random = np.random.default_rng(seed)
    centre = centre_of(prior)
    drawn = [
        random.dirichlet(concentration * centre, CANDIDATES // len(CONCENTRATIONS))
        for concentration in CONCENTRATIONS
    ]
    least: Floats | None = None
    if isinstance(law, ExponentialLaw):
        least = minimum(law, bounds, prior, weighing)
        around = np.maximum(least, 0.01)
        drawn += [random.dirichlet(near * around, CANDIDATES // 2) for near in NEAR]
    candidates = bounds.project(np.concatenate(drawn))
    choices = []
    for judge in bootstraps or [law]:
        losses = judge.predict(candidates) @ weighing
        choices.append(candidates[np.argsort(losses, kind="stable")[:AVERAGED]].mean(axis=0))
    best = bounds.project(np.mean(choices, axis=0))  # against rounding
    return Choice(
        best,
        best if least is None else least,
        law.predict(best[None])[0],
        {name: gain_over(law, bootstraps, best, rival, weighing) for name, rival in rivals.items()},
    )


def minimum(law: ExponentialLaw, bounds: Bounds, start: Floats, weighing: Floats) -> Floats:
    """(D,) the mixture within `bounds` at which the law's weighed loss is least.

    Projected gradient descent with a step that halves until the loss falls; the loss is convex.
    """
    point = bounds.project(start)
    loss = float(law.predict(point[None])[0] @ weighing)
    step = 1.0
    for _ in range(DESCENT_STEPS):
        gradient = weighing @ law.gradient(point)
        trial = bounds.project(point - step * gradient)
        new = float(law.predict(trial[None])[0] @ weighing)
        if new < loss:
            point, loss, step = trial, new, step * 2
        else:
            step /= 2
            if step < 1e-12:
                break
    return point


def gain_over(
    law: Law, bootstraps: Sequence[Law], chosen: Floats, rival: Floats, weighing: Floats
) -> Gain:
    """By how much the weighed loss of `chosen` is below that of `rival` (D,)."""

    def gain(of: Law) -> float:
        losses = of.predict(np.stack([rival, chosen])) @ weighing
        return float(losses[0] - losses[1])

    gains = [gain(each) for each in bootstraps] or [gain(law)]
    low, high = np.quantile(gains, [0.05, 0.95])
    return Gain(gain(law), float(low), float(high))
