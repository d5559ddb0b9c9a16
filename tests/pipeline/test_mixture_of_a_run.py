"""Experiments with proxies on a finished corpus run: its shards, and the scores that it stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2.common.errors import UserError
from qwen2.corpus.quality.linear import Linear
from qwen2.pipeline.corpus import CorpusRecipe, Layout, kept_documents, run_corpus
from qwen2.pipeline.mixture import ThresholdRecipe, threshold_stages
from qwen2.pipeline.mixture.recipe import GivenShards, StoredScores
from qwen2.pipeline.mixture.scores import scores_of
from qwen2.pipeline.stages import run_stages
from qwen2.pipeline.workers import open_workers
from qwen2.tokens.shards import Shards

WORDS = {"verse": list("abcdefgh"), "sums": list("0123456+=")}
MODEL = {
    "vocab_size": 400,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32,
}


def corpus_values(folder: Path, first: str = "", **changes: Any) -> dict[str, Any]:
    """Two sources of sixty documents, some of them twice, and what scores them."""
    rng = np.random.default_rng(3)
    for kind, words in WORDS.items():
        texts = [" ".join(rng.choice(words, 60)) for _ in range(60)]
        texts[9] = texts[2]  # a duplicate: rows of the shards are not rows of the parts
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (folder / f"{kind}.jsonl").write_text(first + "".join(lines))
    return {
        "sources": [
            {"name": k, "kind": k, "format": "jsonl", "paths": [str(folder / f"{k}.jsonl")]}
            for k in WORDS
        ],
        "language": None,
        "quality": {"scorers": {"linear": str(folder / "linear")}},
        "held_out": 0.1,
        "part_megabytes": 0.004,
        **changes,
    }


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    folder = tmp_path_factory.mktemp("corpus")
    values = corpus_values(folder)
    labels = np.array([1.0, 0.0] * 10)
    Linear.fit(["a b c d e f g h", "1 + 2 = 3"] * 10, labels).save(folder / "linear")
    recipe = CorpusRecipe.parse(values)
    with open_workers(1) as workers:
        run_corpus(recipe, folder / "run", workers)
    return Layout(folder / "run", recipe)


def threshold_recipe(layout: Layout, **changes: Any) -> ThresholdRecipe:
    return ThresholdRecipe.parse(
        {
            "experiment": "relaxed_threshold",
            "shards": {"run": str(layout.folder)},
            "scores": {"run": str(layout.folder)},
            "vocabulary": 400,
            "evaluated_kilobytes": 1,
            "margin": 0.5,
            "validation": {"model": MODEL, "tokens": 9000, "context": 32, "rows": 2, "lr": 0.01},
            **changes,
        }
    )


def test_the_shards_of_a_run_are_found(layout: Layout) -> None:
    recipe = threshold_recipe(layout)
    shards = recipe.shards
    assert shards is not None
    assert shards.train == layout.folder / "shards" / "train"
    assert ThresholdRecipe.parse(recipe.model_dump(mode="json")) == recipe, "saved resolved"
    assert len(Shards(shards.train)) == len(list(kept_documents(layout, "train")))
    assert len(Shards(shards.held_out)) == len(list(kept_documents(layout, "held_out")))


def test_stored_scores_are_those_of_the_documents(layout: Layout, tmp_path: Path) -> None:
    """As the classifier gives them anew for the text of each document of the shards."""
    assert len(layout.parts) > 4
    shards = GivenShards.parse({"run": layout.folder})
    text = Shards(shards.train)
    found = scores_of(StoredScores(run=layout.folder), text, shards.tokenizer, len)
    scorer = Linear.load(layout.recipe.quality.scorers.linear)  # type: ignore[union-attr,arg-type]
    texts = {document.id: document.text for document in kept_documents(layout, "train")}
    ids = [text.provenance(number).id for number in range(len(text))]  # type: ignore[union-attr]
    assert found == pytest.approx(scorer.scores([texts[str(id_)] for id_ in ids]), abs=1e-6)
    assert len(set(found.tolist())) > 20


def test_both_sets_come_of_the_stored_scores(layout: Layout, tmp_path: Path) -> None:
    recipe = threshold_recipe(layout)

    def never(text: bytes) -> float:
        raise AssertionError("no text is scored again")

    run = run_stages(threshold_stages(recipe, 1, never)[:2], tmp_path / "run", recipe)
    assert run.results["select"]["ratio"] == pytest.approx(12 / 7, rel=0.15)
    assert set(run.results["small"]["kinds"]) == set(WORDS)


def test_scores_of_another_run_are_refused(layout: Layout, tmp_path: Path) -> None:
    """Parts are called alike in every run, and here every id stands a row earlier."""
    values = corpus_values(tmp_path, first="not JSON\n", tokens=None)
    Linear.fit(["a b c d e f g h", "1 + 2 = 3"], np.array([1.0, 0.0])).save(tmp_path / "linear")
    with open_workers(1) as workers:
        run_corpus(CorpusRecipe.parse(values), tmp_path / "run", workers)
    shards = GivenShards.parse({"run": layout.folder})
    text = Shards(shards.train)
    with pytest.raises(UserError, match="is not of this run"):
        scores_of(StoredScores(run=tmp_path / "run"), text, shards.tokenizer, len)
    with pytest.raises(UserError, match="no scores 'head'; there are quality"):
        scores_of(StoredScores(run=layout.folder, column="head"), text, shards.tokenizer, len)
