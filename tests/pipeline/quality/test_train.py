"""A whole training by recipe, gone on with after a kill; its scores decide without the text."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from qwen2.cli.main import app
from qwen2.common.errors import UserError
from qwen2.corpus.filters.rules import Rule, Rules
from qwen2.corpus.quality.config import Extent
from qwen2.pipeline.mixture.scores import _of_file as read_scores
from qwen2.pipeline.quality import QualityConfig, QualityRecipe, open_scorers, train_quality
from qwen2.pipeline.quality import train as train_module
from qwen2.pipeline.quality.page import histograms
from qwen2.pipeline.quality.reading import Reader

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


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Good and bad texts in two languages, which differ by a word."""
    folder = tmp_path_factory.mktemp("labels")
    random = np.random.default_rng(0)
    paths = {}
    for name, words in (("good", GOOD), ("bad", BAD)):
        paths[name] = folder / f"{name}.jsonl"
        with paths[name].open("w") as file:
            for number in range(60):
                language = ("en", "de")[number % 2]
                text = " ".join([language, str(number), *random.choice(words, 12)])
                file.write(json.dumps({"text": text, "language": language}) + "\n")
    return paths


@pytest.fixture(scope="module")
def values(labels: dict[str, Path], checkpoint: Path) -> dict[str, Any]:
    """A recipe as YAML has it, with everything but a judge."""
    reading = {"model": str(checkpoint), "extent": {"tokens": 64}}
    return {
        "labels": [
            {"path": str(labels["good"]), "label": 1},
            {"path": str(labels["bad"]), "label": 0},
        ],
        "held_out": 0.4,
        "least": 10,
        "linear": {"bits": 12},
        "head": reading,
        "perplexity": reading,
    }


@pytest.fixture(scope="module")
def trained(values: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "quality"
    train_quality(QualityRecipe.parse(values), folder)
    return folder


def test_the_scorers_tell_good_from_bad(trained: Path) -> None:
    figures = json.loads((trained / "quality.json").read_text())
    assert set(figures["agreement"]["quality"]) == {"all", "en", "de"}
    assert figures["agreement"]["quality"]["all"]["auc"] == 1.0
    assert figures["agreement"]["head"]["all"]["auc"] > 0.9
    assert "accuracy" not in figures["agreement"]["perplexity"]["all"]
    assert figures["rank_correlation"]["head"]["head"] == pytest.approx(1.0)
    # One pass of the model gives both.
    assert set(figures["costs"]) == {"quality", "head+perplexity+bits_per_byte"}
    page = (trained / "quality.html").read_text()
    assert page.count("<svg") == 4
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")


def test_a_worker_opens_the_scorers_from_what_it_is_sent(trained: Path) -> None:
    config = pickle.loads(pickle.dumps(QualityConfig.load(trained / "quality.yaml")))
    texts, languages = [" ".join(GOOD), " ".join(BAD), "", "x"], ["en", "de", "en", "tlh"]
    columns: dict[str, np.ndarray] = {}
    for scorer in open_scorers(config):
        found = scorer(texts, languages)
        assert tuple(found) == scorer.columns
        columns |= found
    assert tuple(columns) == config.columns
    assert all(c.shape == (4,) and c.dtype == np.float64 for c in columns.values())
    assert columns["quality"][0] > columns["quality"][1]
    assert np.isnan(columns["perplexity"]).tolist() == [False, False, True, False]
    assert np.isnan(columns["head_percentile"]).tolist() == [False, False, True, False]
    for name in config.scores:
        percentile = columns[f"{name}_percentile"]
        assert ((percentile >= 0) & (percentile <= 1) | np.isnan(percentile)).all()
    assert [len(scorer([], [])["quality"]) for scorer in open_scorers(config)[:1]] == [0]


def test_a_relaxed_threshold_reads_stored_numbers_only(trained: Path, tmp_path: Path) -> None:
    """Scores are stored once; rules and the experiment of two thresholds read them alone."""
    texts = [" ".join([*GOOD[: i % 9], *BAD[i % 9 :]]) for i in range(27)]
    config = QualityConfig(
        linear=trained / "linear", calibration=trained / "calibration.safetensors"
    )
    (scorer,) = open_scorers(config)
    stored = tmp_path / "scores.parquet"
    columns = scorer(texts, ["en"] * 27)
    pq.write_table(pa.table({**columns, "score": columns["quality_percentile"]}), stored)
    del texts
    read = {name: pq.read_table(stored)[name].to_numpy() for name in scorer.columns}
    kept = {}
    for least in (0.8, 0.5):
        rule = Rule(name="quality", statistic="quality_percentile", least=least)
        failures = Rules(rules=(rule,)).judge_all(read, ["en"] * 27)
        kept[least] = {i for i, failed in enumerate(failures) if not failed}
    assert kept[0.8] < kept[0.5]
    assert {i for i in range(27) if i % 9 == 8} <= kept[0.5]  # nothing but good words
    assert not {i for i in range(27) if i % 9 == 0} & kept[0.5]
    assert read_scores(stored).tolist() == columns["quality_percentile"].tolist()


def test_a_killed_run_goes_on_after_its_last_piece(
    values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "PIECE", 8)
    recipe = QualityRecipe.parse(values)
    read: Callable[..., Any] = Reader.read
    train_quality(recipe, tmp_path / "whole")
    texts_read: list[str] = []
    deaths = [24, 88]

    def dies(reader: Reader, texts: list[str], *, loss: bool = True) -> Any:
        if deaths and len(texts_read) >= deaths[0]:
            deaths.pop(0)
            raise KeyboardInterrupt
        texts_read.extend(texts)
        return read(reader, texts, loss=loss)

    monkeypatch.setattr(Reader, "read", dies)
    starts = 0
    while True:
        starts += 1
        try:
            train_quality(recipe, tmp_path / "run")
        except KeyboardInterrupt:
            continue
        break
    assert starts == 3
    assert len(set(texts_read)) == len(texts_read)  # no text twice
    for name in ("head/head.safetensors", "calibration.safetensors"):
        one, other = (tmp_path / folder / name for folder in ("run", "whole"))
        assert one.read_bytes() == other.read_bytes()


def test_a_judge_gives_labels(
    labels: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen2.pipeline.quality import examples

    def judge(prompts: list[str]) -> Any:
        for i, prompt in enumerate(prompts):
            yield i, "no digit" if " 0 " in prompt else 4.0 if "lemma" in prompt else 1.0

    monkeypatch.setattr(examples, "open_judge", lambda config: (judge, "judge"))
    recipe = QualityRecipe.parse(
        {
            "judge": {"model": "judge", "texts": [{"path": str(p)} for p in labels.values()]},
            "linear": {"bits": 12},
            "least": 10,
        }
    )
    results = train_quality(recipe, tmp_path / "run")
    assert results["labels"]["unscored"] == 2
    assert results["labels"]["train"] + results["labels"]["held_out"] == 118
    assert results["report"]["agreement"]["quality"]["all"]["auc"] > 0.9


def test_the_command_prints_figures_by_language(labels: dict[str, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    sources = [{"path": str(labels["good"]), "label": 1}, {"path": str(labels["bad"]), "label": 0}]
    recipe.write_text(yaml.safe_dump({"labels": sources, "least": 10}))
    arguments = ["corpus", "quality", "train", str(recipe), "linear.bits=12", "--out"]
    shown = CliRunner().invoke(app, [*arguments, str(tmp_path / "run")])
    assert shown.exit_code == 0, shown.output
    assert "1.000" in next(line for line in shown.stdout.splitlines() if line.startswith("de "))
    again = CliRunner().invoke(app, [*arguments, str(tmp_path / "run"), "--json"])
    assert json.loads(again.stdout)["report"]["agreement"]["quality"]["all"]["auc"] == 1.0


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no scorer"),
        ({"head": "x"}, "head and head_model belong together"),
        ({"linear": "x", "calibrations": "x"}, "did you mean 'calibration'"),
    ],
)
def test_a_configuration_that_cannot_be(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        QualityConfig.parse(config)
    with pytest.raises(UserError, match="nothing to learn from"):
        QualityRecipe.parse({})


def test_two_extents_of_one_model_share_its_weights(trained: Path) -> None:
    config = QualityConfig.load(trained / "quality.yaml")
    other = {"perplexity_extent": Extent(tokens=5), "calibration": None}
    scorers = open_scorers(config.model_copy(update=other))
    names = [scorer.columns for scorer in scorers]
    assert names == [("quality",), ("head",), ("perplexity", "bits_per_byte")]
    assert scorers[1].reader.model is scorers[2].reader.model  # type: ignore[attr-defined]


def test_histograms_sum_to_one_over_one_range() -> None:
    random = np.random.default_rng(0)
    drawn = histograms(
        {"a": random.normal(size=900), "b": np.append(random.normal(size=90), np.nan)}
    )
    assert drawn["a"][0][0] == drawn["b"][0][0]
    for points in drawn.values():
        assert sum(y for _, y in points[::2]) == pytest.approx(1.0, abs=0.03)
    assert histograms({"a": np.array([np.nan])}) == {}
