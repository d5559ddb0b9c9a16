"""The linear classifier learns, does not depend on its batch, and survives its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.corpus.quality.linear import Linear, LinearConfig, sigmoid
from qwen2.corpus.quality.measure import area

CONFIG = LinearConfig(bits=12, epochs=10)
GOOD = [
    "the",
    "theorem",
    "follows",
    "from",
    "the",
    "lemma",
    "because",
    "every",
    "bounded",
    "sequence",
    "converges",
]
BAD = ["click", "here", "buy", "now", "cheap", "menu", "home", "login"]


def made(count: int, seed: int) -> tuple[list[str], np.ndarray]:
    """Texts of good or bad words, half and half."""
    random = np.random.default_rng(seed)
    targets = np.arange(count) % 2
    return [" ".join(random.choice(GOOD if t else BAD, 12)) for t in targets], targets.astype(float)


@pytest.fixture(scope="module")
def linear() -> Linear:
    return Linear.fit(*made(60, 0), config=CONFIG)


def test_it_tells_good_from_bad_words(linear: Linear) -> None:
    texts, targets = made(40, 1)
    scores = linear.scores(texts)
    assert scores.dtype == np.float32
    assert area(scores, targets > 0.5) == 1.0
    assert ((scores > 0.5) == (targets > 0.5)).all()


def test_order_of_words_tells_by_their_pairs() -> None:
    texts = ["alpha beta", "beta alpha"] * 10
    linear = Linear.fit(texts, np.array([1.0, 0.0] * 10), config=CONFIG)
    first, second = linear.scores(texts[:2])
    assert first > 0.7 > 0.3 > second


def test_soft_labels_are_learned_as_chances() -> None:
    linear = Linear.fit(["same words"] * 20, np.full(20, 0.7), config=LinearConfig(epochs=200))
    assert linear.scores(["same words"])[0] == pytest.approx(0.7, abs=0.01)


def test_importance_weighs_one_label_against_another() -> None:
    texts, targets = ["same words"] * 20, np.arange(20) % 2 * 1.0
    importance = np.where(targets > 0, 1.5, 0.5)
    config = LinearConfig(epochs=200)
    score = Linear.fit(texts, targets, importance, config).scores(texts[:1])[0]
    assert score == pytest.approx(0.75, abs=0.02)


@given(st.lists(st.text(max_size=60), min_size=1, max_size=6), st.integers(0, 5))
def test_any_text_has_a_score_of_its_own(linear: Linear, texts: list[str], which: int) -> None:
    scores = linear.scores(texts)
    assert np.isfinite(scores).all()
    assert ((scores >= 0) & (scores <= 1)).all()
    index = which % len(texts)
    assert linear.scores([texts[index]])[0] == scores[index]


def test_a_text_without_words_has_the_score_of_the_bias(linear: Linear) -> None:
    expected = sigmoid(np.array([linear.bias])).astype(np.float32)[0]
    assert linear.scores(["", " \t"]).tolist() == [expected, expected]
    assert linear.scores([]).shape == (0,)


def test_a_long_text_is_the_mean_of_its_features(linear: Linear) -> None:
    once, often = linear.logits(["home login", "home login " * 30_000])
    assert often == pytest.approx(once, abs=abs(once))


def test_training_again_gives_the_same_bytes_and_files_keep_them(tmp_path: Path) -> None:
    one, other = (Linear.fit(*made(60, 0), config=CONFIG) for _ in range(2))
    for name, linear in (("one", one), ("other", other)):
        linear.save(tmp_path / name)
    weights = [(tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "other")]
    assert weights[0] == weights[1]
    texts = made(10, 5)[0]
    loaded = Linear.load(tmp_path / "one")
    assert loaded.scores(texts).tolist() == one.scores(texts).tolist()
    assert loaded.config == CONFIG


def test_damaged_files_are_refused_by_name(linear: Linear, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json: No such file"):
        Linear.load(tmp_path / "none")
    linear.save(tmp_path / "linear")
    config = tmp_path / "linear/config.json"
    config.write_text(json.dumps({"bits": 13}))
    with pytest.raises(UserError, match=r"weights of shape \(8192,\) expected, \(4096,\) found"):
        Linear.load(tmp_path / "linear")
    config.write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        Linear.load(tmp_path / "linear")
    config.write_text(CONFIG.model_dump_json())
    (tmp_path / "linear/weights.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match="not readable as safetensors"):
        Linear.load(tmp_path / "linear")
