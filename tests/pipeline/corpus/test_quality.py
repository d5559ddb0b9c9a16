"""Stored scores: the linear classifier on all, models on what it lets through, limits later."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from qwen2.common.errors import UserError
from qwen2.corpus import read_documents
from qwen2.corpus.quality.linear import Linear, LinearConfig
from qwen2.pipeline.corpus import CorpusRecipe, Layout, score
from qwen2.pipeline.corpus.judge import read_table
from qwen2.pipeline.corpus.why import life_of


@pytest.fixture(scope="module")
def linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Knows prose from code."""
    rng = random.Random(1)
    good = [small.prose(rng, 1) for _ in range(20)]
    bad = [f"def f{i}(x):\n    return x * {i} + {rng.random()}\n" * 20 for i in range(20)]
    config = LinearConfig(bits=12, epochs=10)
    model = Linear.fit(good + bad, np.array([1.0] * 20 + [0.0] * 20), config=config)
    folder = tmp_path_factory.mktemp("quality") / "linear"
    model.save(folder)
    return folder


def quality(linear: Path, least: float, **more: Any) -> dict[str, Any]:
    rule = {"name": "good", "statistic": "quality", "least": least}
    return {"scorers": {"linear": str(linear)}, "rules": [rule], **more}


def kept(layout: Layout) -> set[str]:
    return {
        document.id
        for part in layout.parts
        for side in ("train", "held_out")
        for document in read_documents(layout.place("kept") / part / f"{side}.parquet")
    }


def test_another_threshold_reads_no_text_again(
    linear: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = small.run(sources, tmp_path / "out", quality=quality(linear, 0.5), tokens=None)
    assert not any(name.startswith("code/") for name in kept(strict))
    assert any(name.startswith("web/") for name in kept(strict))
    life = life_of(strict, "code/code.jsonl#1")
    assert "good: quality" in dict(life.steps)["rules"]
    assert life.facts["scores"]["quality"] < 0.5
    scored = {p: p.stat().st_mtime_ns for p in strict.place("scores").iterdir()}

    def fails(*_: object) -> None:
        raise AssertionError("a text was read")

    monkeypatch.setattr(score, "_texts", fails)
    relaxed = small.run(sources, tmp_path / "out", quality=quality(linear, 0.0), tokens=None)
    assert scored == {p: p.stat().st_mtime_ns for p in relaxed.place("scores").iterdir()}
    assert kept(relaxed) > kept(strict)
    assert any(name.startswith("code/") for name in kept(relaxed))
    page = (tmp_path / "out" / "report.html").read_text()
    assert ">quality</text>" in page


class Counting:
    """A scorer that remembers what it was given."""

    columns = ("head",)

    def __init__(self) -> None:
        self.given: list[str] = []

    def __call__(self, texts: list[str], languages: list[str]) -> dict[str, Any]:
        self.given += texts
        return {"head": np.ones(len(texts))}


class First:
    columns = ("quality",)

    def __call__(self, texts: list[str], languages: list[str]) -> dict[str, Any]:
        return {"quality": np.array([float("def f" not in text) for text in texts])}


def test_models_read_what_the_linear_classifier_lets_through(
    linear: Path, sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Counting()
    monkeypatch.setattr(score, "_scorers", lambda _: [First(), model])
    bulk = {"name": "bulk", "statistic": "quality", "least": 0.5}
    scorers = {"linear": str(linear), "head": "head", "head_model": "model"}
    values = {"scorers": scorers, "bulk": bulk}
    layout = small.run(sources, tmp_path / "out", quality=values, tokens=None)
    assert len(model.given) == 30 + 118
    assert not any("def f" in text for text in model.given)
    for part in layout.parts:
        table = read_table(layout.file("scores", part))
        assert table.column_names == ["quality", "head"]
        is_code = layout.facts(part).source == "code"
        assert table["head"].null_count == (len(table) if is_code else 0)
    assert not any(name.startswith("code/") for name in kept(layout))


def test_rules_of_scores_that_nobody_gives_are_refused(linear: Path, sources: Path) -> None:
    rule = {"name": "a", "statistic": "head", "least": 1}
    values = small.recipe_values(sources, quality=quality(linear, 0.5) | {"rules": [rule]})
    with pytest.raises(UserError, match="no scorer gives 'head'; there are quality"):
        CorpusRecipe.parse(values)
    values["quality"] = quality(linear, 0.5, bulk={"name": "b", "statistic": "perplexity"})
    with pytest.raises(UserError, match="no scorer gives 'perplexity'"):
        CorpusRecipe.parse(values)
