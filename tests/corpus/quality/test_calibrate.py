"""Percentiles: monotone, uniform on their sample, one threshold one share of each language."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.corpus.quality.calibrate import ALL, KNOTS, Calibration, Quantiles

NUMBERS = st.floats(-1e6, 1e6)
SAMPLES = st.lists(NUMBERS, min_size=1, max_size=80)


@given(SAMPLES, st.lists(NUMBERS, min_size=2))
def test_percentiles_never_fall_as_the_score_rises(sample: list[float], asked: list[float]) -> None:
    found = Quantiles.of(np.array(sample)).percentiles(np.sort(np.array(asked)))
    assert (np.diff(found) >= 0).all()
    assert ((found >= 0) & (found <= 1)).all()


@given(SAMPLES)
def test_a_percentile_is_the_part_of_the_sample_below(sample: list[float]) -> None:
    values = np.array(sample)
    found = Quantiles.of(values).percentiles(values)
    below = (values[None] < values[:, None]).mean(1)
    equal = (values[None] == values[:, None]).mean(1)
    np.testing.assert_allclose(found, below + equal / 2, atol=1e-12)


@given(SAMPLES)
def test_beyond_the_sample_it_is_nought_or_one(sample: list[float]) -> None:
    quantiles = Quantiles.of(np.array(sample))
    beyond = np.array([min(sample) - 1, max(sample) + 1])
    assert quantiles.percentiles(beyond).tolist() == [0.0, 1.0]


def test_a_large_sample_keeps_a_thousand_knots_and_is_uniform() -> None:
    sample = np.random.default_rng(0).lognormal(size=50_000)
    quantiles = Quantiles.of(sample)
    assert len(quantiles.values) == KNOTS
    found = np.sort(quantiles.percentiles(sample))
    ideal = (np.arange(len(sample)) + 0.5) / len(sample)
    assert np.abs(found - ideal).max() < 1.5 / KNOTS


def two_languages() -> tuple[np.ndarray, list[str]]:
    """German scores far above English ones; a few documents in Thai."""
    random = np.random.default_rng(1)
    scores = np.concatenate([random.normal(0, 1, 3000), random.normal(5, 0.1, 1000), [2.0] * 9])
    return scores, ["en"] * 3000 + ["de"] * 1000 + ["th"] * 9


def test_one_threshold_keeps_one_share_of_each_language() -> None:
    scores, languages = two_languages()
    calibration = Calibration.fit({"quality": scores}, languages)
    found = calibration.percentiles("quality", scores, languages)
    names = np.array(languages)
    for language in ("en", "de"):
        raw = (scores[names == language] >= np.quantile(scores, 0.7)).mean()
        assert abs(raw - 0.3) > 0.2
        assert (found[names == language] >= 0.7).mean() == pytest.approx(0.3, abs=2e-3)


def test_a_language_with_few_documents_or_unknown_takes_all_together() -> None:
    scores, languages = two_languages()
    calibration = Calibration.fit({"quality": scores}, languages)
    assert set(calibration.tables["quality"]) == {ALL, "en", "de"}
    found = calibration.percentiles("quality", np.array([2.0, 2.0]), ["th", "tlh"])
    every = calibration.tables["quality"][ALL].percentiles(np.array([2.0]))
    assert found.tolist() == [every[0], every[0]]


def test_what_is_no_number_stays_so_and_is_no_part_of_the_sample() -> None:
    scores = np.array([1.0, np.nan, 3.0])
    calibration = Calibration.fit({"perplexity": scores}, ["en"] * 3)
    found = calibration.percentiles("perplexity", scores, ["en"] * 3)
    assert np.isnan(found[1])
    assert found[[0, 2]].tolist() == [0.25, 0.75]
    with pytest.raises(UserError, match="'head': the sample has no scores"):
        Calibration.fit({"head": np.array([np.nan])}, ["en"])


def test_files_keep_all_tables(tmp_path: Path) -> None:
    scores, languages = two_languages()
    calibration = Calibration.fit({"quality": scores, "head": -scores}, languages)
    calibration.save(tmp_path / "calibration.safetensors")
    loaded = Calibration.load(tmp_path / "calibration.safetensors")
    for name in ("quality", "head"):
        one, other = (c.percentiles(name, scores, languages) for c in (calibration, loaded))
        assert one.tolist() == other.tolist()
    with pytest.raises(UserError, match="none of 'perplexity'"):
        loaded.percentiles("perplexity", scores, languages)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    with pytest.raises(UserError, match="no such file"):
        Calibration.load(path)
    save_file({"weights": np.zeros(3)}, path)
    with pytest.raises(UserError, match="'weights' is no list of quantiles"):
        Calibration.load(path)
    save_file({"quality/en": np.zeros(3)}, path)
    with pytest.raises(UserError, match="no quantiles of 'quality' for all languages"):
        Calibration.load(path)
