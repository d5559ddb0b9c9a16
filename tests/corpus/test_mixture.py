"""Mixtures stay mixtures, within their bounds, whatever is drawn; and draws can be repeated."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.corpus.mixture import Bounds, draw_mixtures, flattened, natural, uniform

TOKENS = st.lists(st.integers(1, 10**9), min_size=2, max_size=17).map(
    lambda sizes: np.array(sizes, np.float64)
)


def bounds_of(tokens: np.ndarray, room: float, least: float) -> Bounds:
    return Bounds.by_epochs(tokens, tokens.sum() / room, 1.0, least / len(tokens))


def test_bounds_by_hand() -> None:
    """100, 300 and 600 tokens, a budget of 800, at most twice each."""
    bounds = Bounds.by_epochs(np.array([100.0, 300.0, 600.0]), 800, 2.0, least=0.3)
    assert bounds.most.tolist() == [0.25, 0.75, 1.0]
    assert bounds.least.tolist() == [0.25, 0.3, 0.3], "a source without the text for it has less"


def test_projection_by_hand() -> None:
    """0.9, 0.6, 0.0 is 0.5 too much: 0.25 off the first two; with a cap, what it cuts goes back."""
    free = Bounds(np.zeros(3), np.ones(3))
    assert free.project(np.array([0.9, 0.6, 0.0])) == pytest.approx([0.65, 0.35, 0.0])
    capped = Bounds(np.zeros(3), np.array([0.5, 1.0, 1.0]))
    assert capped.project(np.array([0.9, 0.6, 0.0])) == pytest.approx([0.5, 0.5, 0.0])
    floored = Bounds(np.full(3, 0.1), np.ones(3))
    assert floored.project(np.array([0.9, 0.6, 0.0])) == pytest.approx([0.6, 0.3, 0.1])


@given(TOKENS, st.floats(1.01, 20), st.floats(0, 0.99), st.integers(0, 99), st.floats(0.1, 5))
def test_projection_lands_in_the_bounds_and_is_nearest(
    tokens: np.ndarray, room: float, least: float, seed: int, scale: float
) -> None:
    bounds = bounds_of(tokens, room, least)
    random = np.random.default_rng(seed)
    points = random.normal(0, scale, (20, len(tokens)))
    inside = bounds.project(points)
    assert inside.sum(-1) == pytest.approx(np.ones(20))
    assert (inside >= bounds.least).all()
    assert (inside <= bounds.most).all()
    assert bounds.project(inside) == pytest.approx(inside, abs=1e-9)
    # The nearest point of a convex set: no other one of it lies beyond the plane through it.
    beyond = np.einsum("nd,md->nm", points - inside, inside)
    assert (beyond <= np.diag(beyond)[:, None] + 1e-7).all()


# Of two sources, one a billion times as large, there may not be so many different mixtures.
@settings(max_examples=25)
@given(
    st.lists(st.integers(10**6, 10**7), min_size=2, max_size=17).map(
        lambda sizes: np.array(sizes, np.float64)
    ),
    st.integers(0, 9),
)
def test_draws_are_mixtures_that_differ(tokens: np.ndarray, seed: int) -> None:
    bounds = bounds_of(tokens, 1e9, 0.1)
    mixtures = draw_mixtures(natural(tokens), 12, bounds, seed)
    assert mixtures.shape == (12, len(tokens))
    assert mixtures.sum(1) == pytest.approx(np.ones(12))
    assert (mixtures >= bounds.least).all()
    assert (mixtures <= bounds.most).all()
    assert len({tuple(row) for row in np.rint(mixtures / 1e-3).astype(int).tolist()}) == 12
    assert (draw_mixtures(natural(tokens), 12, bounds, seed) == mixtures).all()
    assert (draw_mixtures(natural(tokens), 5, bounds, seed) == mixtures[:5]).all()


def test_another_seed_draws_others_around_the_same_centre() -> None:
    tokens = np.array([1.0, 4.0, 16.0])
    free = Bounds(np.zeros(3), np.ones(3))
    one, two = (draw_mixtures(natural(tokens), 400, free, seed) for seed in (0, 1))
    assert not (one == two).any(axis=1).all()
    centre = flattened(natural(tokens), 2.0)  # 1 : 2 : 4
    assert centre == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert one.mean(axis=0) == pytest.approx(centre, abs=0.05)


def test_no_room_is_said() -> None:
    with pytest.raises(UserError, match="do not make up"):
        Bounds.by_epochs(np.array([10.0, 20.0]), 100, 2.0)
    with pytest.raises(UserError, match="more than 1"):
        Bounds.by_epochs(np.array([10.0, 20.0]), 10, 1.0, least=0.6)
    tight = Bounds(np.array([0.5, 0.5]), np.array([0.5, 0.5]))
    with pytest.raises(UserError, match="room for 1 different mixtures, 3 wanted"):
        draw_mixtures(uniform(2), 3, tight, seed=0)


@given(TOKENS, st.floats(1, 100))
def test_flattening_keeps_the_order_and_ends_uniform(tokens: np.ndarray, heat: float) -> None:
    share = natural(tokens)
    assert flattened(share, 1.0) == pytest.approx(share)
    assert flattened(share, 1e9) == pytest.approx(uniform(len(tokens)), rel=1e-5)
    hot = flattened(share, heat)
    assert hot.sum() == pytest.approx(1)
    assert (np.diff(hot[np.argsort(share)]) >= -1e-12).all()
