"""Laws from a mixture to the losses of the model trained on it.

    exponential   L_k(r) = c_k + a_k exp(sum_j t_kj r_j)      Ye et al. 2024, arXiv 2403.16952
    linear        L_k(r) = sum_j b_kj r_j                     the baseline of RegMix
    boosted       trees of LightGBM                           Liu et al. 2024 (RegMix)

Identifiability: the weights r sum to 1, so adding a constant to all t_kj and dividing a_k by its
exponential changes nothing; and the linear law needs no intercept. What is fitted is therefore
L = c + exp(sum_j s_j r_j), and `a` and `t` are given with the mean of t at 0. c is found only where
the losses bend; where they look straight, it is anything below them, and only predictions count.

The fit is by Levenberg and Marquardt's method on Huber's loss (weights by iteration), for all
targets, starts and bootstrap draws at once: a thousand fits of 18 parameters to 32 points take a
second, where one minimiser after the other takes minutes. A small ridge draws the t of a target
towards each other; its strength is chosen by cross-validation, one for all targets.

With N proxies, D sources and K targets, all arrays are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qwen2.common.errors import UserError

Floats = NDArray[np.float64]

LawName = Literal["auto", "exponential", "linear", "lightgbm"]
BOOSTED_FROM = 257
"""Proxies from which trees are better than the exponential law on RegMix's runs."""

HUBER = 0.4  # residual, in spreads of its target's losses, beyond which it counts linearly
STARTS = (0.2, 0.5, 0.8, 0.95)  # c at the start, as a part of the least loss
RIDGES = (0.0, 1e-3, 1e-2)
FOLDS = 8
MOST_STEPS = 200


class Law(Protocol):
    """What a fit gives."""

    def predict(self, mixtures: Floats, /) -> Floats:
        """(M, D) mixtures -> (M, K) losses."""
        ...


@dataclass(frozen=True)
class ExponentialLaw:
    """L_k(r) = floor_k + exp(slopes_k · r): convex in r."""

    floor: Floats
    """(K,) c"""
    slopes: Floats
    """(K, D) s = t + log a"""
    ridge: float = 0.0
    """With which it was fitted."""

    def predict(self, mixtures: Floats) -> Floats:
        """(M, D) mixtures -> (M, K) losses."""
        return self.floor + np.exp(mixtures @ self.slopes.T)

    def gradient(self, mixture: Floats) -> Floats:
        """(D,) mixture -> (K, D) derivatives of the losses by the weights."""
        return np.exp(self.slopes @ mixture)[:, None] * self.slopes

    @property
    def amplitude(self) -> Floats:
        """(K,) a, with the mean of t at 0."""
        return np.exp(self.slopes.mean(axis=1))

    @property
    def effects(self) -> Floats:
        """(K, D) t: how source j acts on target k against the other sources; below 0 it helps."""
        return self.slopes - self.slopes.mean(axis=1, keepdims=True)


@dataclass(frozen=True)
class LinearLaw:
    """L_k(r) = coefficients_k · r: coefficient j is the loss on source j alone."""

    coefficients: Floats
    """(K, D)"""

    def predict(self, mixtures: Floats) -> Floats:
        """(M, D) mixtures -> (M, K) losses."""
        return mixtures @ self.coefficients.T


@dataclass(frozen=True)
class BoostedLaw:
    """A forest of LightGBM for each target."""

    forests: list[Any]

    def predict(self, mixtures: Floats) -> Floats:
        """(M, D) mixtures -> (M, K) losses."""
        return np.stack([forest.predict(mixtures) for forest in self.forests], axis=1)


def fit_law(name: LawName, mixtures: Floats, losses: Floats, seed: int = 0) -> Law:
    """The law of that name; `auto` is the exponential one, and above 256 proxies LightGBM.

    Raises:
        UserError: LightGBM is asked for with too few proxies, or is not installed.
    """
    if name == "auto":
        name = "lightgbm" if len(mixtures) >= BOOSTED_FROM else "exponential"
    if name == "exponential":
        return fit_exponential(mixtures, losses)
    return fit_linear(mixtures, losses) if name == "linear" else fit_boosted(mixtures, losses, seed)


def fit_exponential(
    mixtures: Floats,
    losses: Floats,
    weights: Floats | None = None,
    ridge: float | None = None,
) -> ExponentialLaw:
    """Fit to mixtures (N, D) and losses (N, K).

    Args:
        weights: (N,) how much each proxy counts; None: 1 each.
        ridge: None: the best of `RIDGES` by cross-validation.
    """
    if ridge is None:
        ridge = _best_ridge(mixtures, losses)
    counts = np.ones(len(mixtures)) if weights is None else weights
    return _fit_all(mixtures, losses, counts[None], ridge)[0]


def bootstrap_exponential(
    mixtures: Floats, losses: Floats, draws: int, ridge: float, seed: int
) -> list[ExponentialLaw]:
    """Laws fitted to `draws` Bayesian bootstraps of the proxies (Rubin 1981).

    Their weights are drawn from a flat Dirichlet: every proxy stays, with more or less weight.
    Drawing proxies with repetition would leave 20 different ones of 32, hardly more than there are
    parameters.
    """
    random = np.random.default_rng(seed)
    weights = random.dirichlet(np.ones(len(mixtures)), draws) * len(mixtures)
    return _fit_all(mixtures, losses, weights, ridge)


def fit_linear(mixtures: Floats, losses: Floats) -> LinearLaw:
    """Least squares on mixtures (N, D) and losses (N, K); the smallest solution where N < D."""
    solution = np.linalg.lstsq(mixtures, losses, rcond=None)[0]  # (D, K)
    return LinearLaw(solution.T.astype(np.float64))


def fit_boosted(mixtures: Floats, losses: Floats, seed: int = 0) -> BoostedLaw:
    """Gradient-boosted trees for each target; deterministic, in one thread.

    Raises:
        UserError: 256 proxies or fewer, on which trees fail; or LightGBM is not installed.
    """
    if len(mixtures) < BOOSTED_FROM:
        raise UserError(
            f"law lightgbm: {len(mixtures)} proxies; it needs {BOOSTED_FROM} or more, "
            "choose law=exponential"
        )
    try:
        import lightgbm
    except ImportError:
        raise UserError(
            "law lightgbm: LightGBM is not installed; pip install 'qwen2[corpus]', "
            "or choose law=exponential"
        ) from None
    settings = {
        "objective": "regression",
        "learning_rate": 0.01,
        "num_leaves": 8,
        "min_data_in_leaf": 10,
        "seed": seed,
        "deterministic": True,
        "num_threads": 1,
        "verbosity": -1,
    }
    return BoostedLaw(
        [
            lightgbm.train(settings, lightgbm.Dataset(mixtures, target), num_boost_round=1000)
            for target in losses.T
        ]
    )


def spearman(one: Floats, other: Floats) -> float:
    """Spearman's rank correlation of two lists (M,), ties sharing their rank; NaN if constant."""
    first, second = (rank - rank.mean() for rank in map(ranks, (one, other)))
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / size if size else float("nan")


def out_of_fold(name: LawName, mixtures: Floats, losses: Floats, folds: int = FOLDS) -> Floats:
    """(N, K) what a law predicts for each proxy when it was fitted without its fold."""
    predicted = np.empty_like(losses)
    for fold in range(min(folds, len(mixtures))):
        inside = np.arange(len(mixtures)) % folds == fold
        law = fit_law(name, mixtures[~inside], losses[~inside])
        predicted[inside] = law.predict(mixtures[inside])
    return predicted


def ranks(values: Floats) -> Floats:
    """The place of each value in their order, from 1; equal ones share the middle of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]


def _best_ridge(mixtures: Floats, losses: Floats) -> float:
    """The ridge whose laws predict the proxies left out of their fit best.

    An error counts in spreads of its target, and at most as three: one wild extrapolation must not
    decide.
    """
    proxies = np.arange(len(mixtures))
    folds = [proxies % FOLDS == fold for fold in range(min(FOLDS, len(mixtures)))]
    spread = _spread(losses.T)[:, 0]
    errors = []
    for ridge in RIDGES:
        counts = np.array([~inside for inside in folds], np.float64)
        laws = _fit_all(mixtures, losses, counts, ridge)
        errors.append(
            sum(
                np.minimum(np.abs(law.predict(mixtures[i]) - losses[i]) / spread, 3.0).sum()
                for law, i in zip(laws, folds, strict=True)
            )
        )
    return RIDGES[int(np.argmin(errors))]


def _fit_all(
    mixtures: Floats, losses: Floats, weights: Floats, ridge: float
) -> list[ExponentialLaw]:
    """A law for each row of `weights` (B, N)."""
    B, K, D = len(weights), losses.shape[1], mixtures.shape[1]
    targets = np.tile(losses.T, (B, 1))  # (B K, N)
    counts = np.repeat(weights, K, axis=0)  # (B K, N)
    fits = _Fits(mixtures, targets, counts, ridge)
    best, parameters = np.full(B * K, np.inf), np.zeros((B * K, 1 + D))
    for part in STARTS:
        objective, found = fits.minimise(fits.start(part))
        better = objective < best
        best = np.where(better, objective, best)
        parameters = np.where(better[:, None], found, parameters)
    shaped = parameters.reshape(B, K, 1 + D)
    return [ExponentialLaw(each[:, 0], each[:, 1:], ridge) for each in shaped]


def _spread(targets: Floats) -> Floats:
    """(P, 1) of the losses (P, N): 1.48 times their median distance from their median."""
    middle = np.median(targets, axis=1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(targets - middle), axis=1, keepdims=True)
    widest = targets.std(axis=1, keepdims=True)
    return np.where(spread > 0, spread, np.where(widest > 0, widest, 1.0))


@dataclass(frozen=True)
class _Fits:
    """P independent problems of the same mixtures, solved side by side.

    Parameters (P, 1 + D): c, then s.
    """

    mixtures: Floats
    targets: Floats
    """(P, N)"""
    counts: Floats
    """(P, N)"""
    ridge: float

    def start(self, part: float) -> Floats:
        """c at `part` of the least loss, and s by least squares on log(L - c)."""
        least = self.targets.min(axis=1)
        floor = least - (1 - part) * np.abs(least) - 1e-3 * _spread(self.targets)[:, 0]
        logs = np.log(self.targets - floor[:, None])
        middle = (self.counts * logs).sum(1) / self.counts.sum(1)
        weighted = self.counts[:, :, None] * self.mixtures
        normal = np.swapaxes(weighted, 1, 2) @ self.mixtures + 1e-3 * np.eye(self._sources)
        right = np.einsum("pnd,pn->pd", weighted, logs - middle[:, None])
        slopes = middle[:, None] + np.linalg.solve(normal, right[..., None])[..., 0]
        return np.column_stack([floor, slopes])

    def minimise(self, parameters: Floats) -> tuple[Floats, Floats]:
        """Objectives (P,) and parameters of the minimum that is reached from `parameters`."""
        D = self._sources
        centring = self.ridge * (np.eye(D) - 1 / D)
        diagonal = np.arange(1 + D)
        damping = np.full(len(parameters), 1e-2)
        objective, raised, residual = self._objective(parameters)
        for _ in range(MOST_STEPS):
            bent = HUBER / np.maximum(np.abs(residual), HUBER) * self.counts  # (P, N)
            jacobian = np.empty((*residual.shape, 1 + D))
            jacobian[..., 0] = 1
            jacobian[..., 1:] = raised[..., None] * self.mixtures
            jacobian /= self._scale[..., None]
            weighted = np.swapaxes(jacobian * bent[..., None], 1, 2)  # (P, 1 + D, N)
            normal = weighted @ jacobian
            downhill = -(weighted @ residual[..., None])[..., 0]
            normal[:, 1:, 1:] += centring
            downhill[:, 1:] -= parameters[:, 1:] @ centring
            normal[:, diagonal, diagonal] += damping[:, None] * (
                normal[:, diagonal, diagonal] + 1e-9
            )
            trial = parameters + np.linalg.solve(normal, downhill[..., None])[..., 0]
            new, new_raised, new_residual = self._objective(trial)
            better = new < objective
            gained = np.where(better, objective - new, 0.0) > 1e-8 * (objective + 1e-10)
            parameters = np.where(better[:, None], trial, parameters)
            objective = np.where(better, new, objective)
            raised = np.where(better[:, None], new_raised, raised)
            residual = np.where(better[:, None], new_residual, residual)
            damping = np.clip(np.where(better, damping / 3, damping * 4), 1e-6, 1e9)
            if not (gained | (~better & (damping < 1e4))).any():
                break
        return objective, parameters

    @property
    def _sources(self) -> int:
        return self.mixtures.shape[1]

    @cached_property
    def _scale(self) -> Floats:
        return _spread(self.targets)

    def _objective(self, parameters: Floats) -> tuple[Floats, Floats, Floats]:
        """Objectives (P,), exp(s · r) (P, N) and residuals in spreads (P, N)."""
        slopes = parameters[:, 1:]
        raised = np.exp(np.clip(slopes @ self.mixtures.T, -50, 50))
        residual = (parameters[:, :1] + raised - self.targets) / self._scale
        size = np.abs(residual)
        bent = np.where(size <= HUBER, residual**2 / 2, HUBER * (size - HUBER / 2))
        away = slopes - slopes.mean(axis=1, keepdims=True)
        penalty = self.ridge / 2 * (away**2).sum(axis=1)
        return (self.counts * bent).sum(axis=1) + penalty, raised, residual


def law_values(law: Law, sources: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
    """The parameters of a law by name, for a file of results; empty for trees."""
    if isinstance(law, ExponentialLaw):
        return {
            target: {
                "c": float(law.floor[k]),
                "a": float(law.amplitude[k]),
                "t": dict(zip(sources, law.effects[k].tolist(), strict=True)),
            }
            for k, target in enumerate(targets)
        }
    if isinstance(law, LinearLaw):
        return {
            target: dict(zip(sources, law.coefficients[k].tolist(), strict=True))
            for k, target in enumerate(targets)
        }
    return {}
