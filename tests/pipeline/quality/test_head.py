"""A head learns, is fitted to its minimum, and is refused on another model."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from qwen2.common.errors import UserError
from qwen2.corpus.quality.config import Extent
from qwen2.corpus.quality.measure import area
from qwen2.pipeline.quality.head import Head, HeadConfig, check_model, fingerprint


def made(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Means of which the fourth tells the class, on another scale than the others."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, 8)).astype(np.float32) * 10 + 3
    return x, (x[:, 3] + random.normal(size=count) > 3).astype(float)


def test_a_linear_head_is_sklearns_logistic_regression() -> None:
    x, y = made(200, 0)
    head = Head.fit(x, y, np.ones(200), HeadConfig(l2=0.05))
    scaled = (x - x.mean(0)) / x.std(0, ddof=1)
    peer = LogisticRegression(C=1 / (0.05 * 200), tol=1e-8).fit(scaled, y)
    np.testing.assert_allclose(head.scores(x), peer.predict_proba(scaled)[:, 1], atol=2e-3)


def test_importance_is_repetition() -> None:
    x, y = made(100, 0)
    weights = np.where(np.arange(100) < 30, 2.0, 1.0)
    weighed = Head.fit(x, y, weights / weights.mean(), HeadConfig())
    again = np.concatenate([x, x[:30]])
    repeated = Head.fit(again, np.concatenate([y, y[:30]]), np.ones(130), HeadConfig())
    # Standardised by other means, so they differ by what the penalty makes of it.
    np.testing.assert_allclose(weighed.scores(x), repeated.scores(x), atol=0.02)


def test_a_hidden_layer_learns_what_a_line_cannot() -> None:
    random = np.random.default_rng(0)
    x = random.normal(size=(300, 4)).astype(np.float32)
    y = (x[:, 0] * x[:, 1] > 0).astype(float)
    scores = {
        hidden: Head.fit(x, y, np.ones(300), HeadConfig(hidden=hidden, l2=1e-3)).scores(x)
        for hidden in (0, 16)
    }
    areas = {hidden: area(values, y > 0.5) for hidden, values in scores.items()}
    assert areas[0] is not None
    assert areas[0] < 0.7
    assert areas[16] is not None
    assert areas[16] > 0.95


@pytest.mark.parametrize("hidden", [0, 5])
def test_files_keep_a_head(tmp_path: Path, hidden: int) -> None:
    x, y = made(50, 0)
    head = Head.fit(x, y, np.ones(50), HeadConfig(hidden=hidden))
    head.save(tmp_path / "head", Extent(tokens=77), "abc")
    loaded, identity = Head.load(tmp_path / "head")
    assert loaded.scores(x).tolist() == head.scores(x).tolist()
    assert identity.extent == Extent(tokens=77)
    assert identity.fingerprint == "abc"


def test_a_head_names_its_model(checkpoint: Path, tmp_path: Path) -> None:
    x, y = made(50, 0)
    Head.fit(x, y, np.ones(50), HeadConfig()).save(
        tmp_path / "head", Extent(), fingerprint(str(checkpoint))
    )
    identity = Head.load(tmp_path / "head")[1]
    check_model(tmp_path / "head", identity, str(checkpoint))
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    check_model(tmp_path / "head", identity, str(copy))
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(UserError, match="trained on another model"):
        check_model(tmp_path / "head", identity, str(copy))


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    x, y = made(50, 0)
    Head.fit(x, y, np.ones(50), HeadConfig()).save(tmp_path / "head", Extent(), "abc")
    (tmp_path / "head/head.safetensors").unlink()
    with pytest.raises(UserError, match=r"head\.safetensors: no such file"):
        Head.load(tmp_path / "head")
