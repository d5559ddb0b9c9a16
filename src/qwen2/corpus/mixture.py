"""Mixtures: points of the simplex, one weight a source; what bounds them, and drawing them.

Report section 3.1 chooses its mixture by experiments on scaled-down models, and does not say how.
The way here is RegMix's (Liu et al. 2024, arXiv 2407.01492): draw mixtures from Dirichlet
distributions around the natural one, train a small proxy model on each, fit a law from mixture to
loss (mixing_law.py), take what it predicts best (choose_mixture.py).

Deviations: RegMix sets weights below a threshold to zero and draws again what is above its upper
bound; here both bounds hold by projection, so that any bounds with a point between them can be
drawn in. D is the number of sources throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from qwen2.common.errors import UserError

Floats = NDArray[np.float64]

CONCENTRATIONS = (1.0, 2.0, 4.0, 8.0)
"""Sums of the Dirichlet parameters: at 1 one or two sources have nearly all, at 8 many some."""
FLATTENED = 2.0  # temperature of the prior that is drawn around, as in RegMix
LEAST_CENTRE = 0.02  # of a source in what is drawn around, or a tiny one would never be tried
ALIKE = 1e-3  # mixtures that agree to so much in every weight are one
ATTEMPTS = 100  # draws for every mixture wanted, before it is said that there is no room


@dataclass(frozen=True)
class Bounds:
    """least <= weight <= most, a pair for each source; there is a mixture between them."""

    least: Floats
    """(D,)"""
    most: Floats
    """(D,)"""

    @classmethod
    def by_epochs(cls, tokens: Floats, budget: float, epochs: float, least: float = 0.0) -> Self:
        """No source comes more than `epochs` times in a training of `budget` tokens.

        Args:
            tokens: (D,) tokens of each source.
            least: of every weight; a source that has less text than that allows stays below it.

        Raises:
            UserError: the text does not suffice, or the least weights are more than everything.
        """
        most = np.minimum(1.0, epochs * tokens / budget)
        if most.sum() < 1:
            raise UserError(
                f"mixture: {tokens.sum():,.0f} tokens, {epochs:g} times at most, do not make up "
                f"{budget:,.0f}; allow more epochs or fewer tokens"
            )
        if least * len(tokens) > 1:
            raise UserError(
                f"mixture: least weight {least:g} for each of {len(tokens)} sources is more than 1"
            )
        return cls(np.minimum(least, most), most)

    def project(self, points: Floats) -> Floats:
        """(..., D) any points -> (..., D) the mixtures within the bounds that are nearest to them.

        The nearest is clip(point - t) for the one t at which the weights sum to 1; t is found by
        bisection (Wang & Lu 2015 for the capped simplex).
        """
        points = np.asarray(points, np.float64)
        low = (points - self.most).min(axis=-1, keepdims=True)
        high = (points - self.least).max(axis=-1, keepdims=True)
        for _ in range(64):
            middle = (low + high) / 2
            over = np.clip(points - middle, self.least, self.most).sum(-1, keepdims=True) > 1
            low, high = np.where(over, middle, low), np.where(over, high, middle)
        return np.clip(points - (low + high) / 2, self.least, self.most)


def natural(tokens: Floats) -> Floats:
    """(D,) tokens of each source -> (D,) its share of the text."""
    return tokens / tokens.sum()


def uniform(sources: int) -> Floats:
    """(D,) equal weights."""
    return np.full(sources, 1 / sources)


def flattened(mixture: Floats, temperature: float) -> Floats:
    """p^(1/T), normalised: 1 leaves a mixture as it is, infinity makes it uniform.

    What multilingual models draw their languages by (Conneau & Lample 2019).
    """
    powered = mixture ** (1 / temperature)
    return powered / powered.sum()


def centre_of(prior: Floats) -> Floats:
    """(D,) the mean of Dirichlet draws around `prior`, up to normalisation."""
    return np.maximum(flattened(prior, FLATTENED), LEAST_CENTRE)


def draw_mixtures(
    prior: Floats,
    count: int,
    bounds: Bounds,
    seed: int,
    concentrations: Sequence[float] = CONCENTRATIONS,
) -> Floats:
    """(count, D) different mixtures, drawn around `prior` (D,) and moved into `bounds`.

    Mixture i is of concentration i modulo their number, so that any beginning has all of them. The
    same arguments give the same mixtures, and a larger `count` begins with those of a smaller one.

    Raises:
        UserError: the bounds leave no room for so many different ones.
    """
    random = np.random.default_rng(seed)
    centre = centre_of(prior)
    kept: dict[tuple[int, ...], Floats] = {}
    for _ in range(ATTEMPTS * count):
        if len(kept) == count:
            break
        concentration = concentrations[len(kept) % len(concentrations)]
        mixture = bounds.project(random.dirichlet(concentration * centre))
        kept.setdefault(tuple(np.rint(mixture / ALIKE).astype(int).tolist()), mixture)
    if len(kept) < count:
        raise UserError(
            f"mixture: the bounds leave room for {len(kept)} different mixtures, {count} wanted; "
            "allow more epochs, a smaller least weight, or fewer proxies"
        )
    return np.array(list(kept.values()))
