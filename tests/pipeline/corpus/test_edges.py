"""Corpora that have nothing where something is expected, or something odd."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small

from qwen2.common.errors import UserError
from qwen2.corpus import Document, read_documents
from qwen2.corpus.filters.rules import Rule
from qwen2.pipeline.corpus import CorpusRecipe, prepare, run_corpus, score
from qwen2.pipeline.corpus.fates import BINS, axes, edges_of
from qwen2.pipeline.corpus.layout import Layout
from qwen2.pipeline.corpus.page import PAGE, SUMMARY
from qwen2.pipeline.corpus.why import life_of
from qwen2.pipeline.workers import open_workers

Row = dict[str, Any]
PLAIN: Row = {"filters": {"plain": {"measures": "nothing"}}, "decontamination": None}


def source(folder: Path, name: str, rows: list[Row], **more: Any) -> Row:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "name": name, "format": "jsonl", "kind": "web", "filters": "plain", "paths": [str(path)],
    } | more  # fmt: skip


def texts(count: int, seed: int = 1) -> list[Row]:
    rng = random.Random(seed)
    return [{"text": small.prose(rng, 1)} for _ in range(count)]


def run(folder: Path, sources: list[Row], **changes: Any) -> Layout:
    values = small.recipe_values(folder) | PLAIN | {"tokens": None, "sources": sources} | changes
    recipe = CorpusRecipe.parse(values)
    with open_workers(1) as workers:
        run_corpus(recipe, folder / "out", workers)
    return Layout(folder / "out", recipe)


def kept(layout: Layout) -> list[Document]:
    return [
        document
        for part in layout.parts
        for side in ("train", "held_out")
        for document in read_documents(layout.place("kept") / part / f"{side}.parquet")
    ]


def totals(layout: Layout) -> dict[str, int]:
    counts = json.loads((layout.folder / SUMMARY).read_text())["totals"]
    return {fate: documents for fate, (documents, _) in counts.items()}


def test_an_empty_source_and_one_that_holds_no_document(tmp_path: Path) -> None:
    bad = source(tmp_path, "bad", [{"text": 1}])
    layout = run(tmp_path, [source(tmp_path, "empty", []), bad, source(tmp_path, "web", texts(5))])
    assert len(layout.parts) == 3
    assert sum(totals(layout).values()) == len(kept(layout)) == 5


def test_a_part_of_which_nothing_stays(tmp_path: Path) -> None:
    """The second part is all duplicates, the third is dropped by rules."""
    web = texts(5)
    short = source(tmp_path, "short", [{"text": "no"}] * 3)
    sources = [source(tmp_path, "web", web), source(tmp_path, "again", web), short]
    layout = run(tmp_path, sources, shortest=10)
    assert {document.id.partition("/")[0] for document in kept(layout)} == {"web"}
    assert {name: totals(layout)[name] for name in ("duplicate", "rules")} == {
        "duplicate": 5, "rules": 3,
    }  # fmt: skip


def test_two_sources_with_the_same_file(tmp_path: Path) -> None:
    first = source(tmp_path, "web", texts(4))
    layout = run(tmp_path, [first | {"name": "first"}, first | {"name": "second"}])
    assert sorted(document.id.partition("/")[0] for document in kept(layout)) == ["first"] * 4
    life = life_of(layout, kept(layout)[0].id.replace("first/", "second/"))
    assert (life.fate, life.document.source) == ("duplicate", kept(layout)[0].source)


def test_lone_surrogates_and_odd_ids(tmp_path: Path) -> None:
    rows = texts(3)
    rows[0]["text"] += " a\ud800b"
    rows[1]["title"] = "c\udfffd"
    rows[2]["key\ud800"] = ["\ud800"]
    odd = source(tmp_path, "a#b %20 <i>ü", rows) | {"name": "odd"}
    layout = run(tmp_path, [odd])
    found = {document.id: document for document in kept(layout)}
    assert len(found) == 3
    assert any("ab" in document.text for document in found.values())
    for name in found:
        assert life_of(layout, name).document.id == name
    page = (layout.folder / PAGE).read_bytes().decode()
    assert "<i>" not in page


def test_without_a_language_and_with_one_that_is_no_code(tmp_path: Path) -> None:
    """Null, empty, and a label that would be HTML."""
    rows = texts(4)
    for row, label in zip(rows, [None, "", "<b>x", "en"], strict=True):
        row["language"] = label
    layout = run(tmp_path, [source(tmp_path, "web", rows)], language=None)
    assert len(kept(layout)) == 4
    assert "<b>x" not in (layout.folder / PAGE).read_text()


def test_mixed_stays_where_it_is_wanted(tmp_path: Path) -> None:
    rng = random.Random(3)
    english = " ".join(small.sentence(rng, 12) for _ in range(6))
    rows = [*texts(3), {"text": "\n\n".join([small.GERMAN, english, small.GERMAN, english])}]
    sources = [source(tmp_path, "web", rows)]
    layout = run(tmp_path, sources, language={"keep": ["en", "mixed"]})
    assert [d.id for d in kept(layout) if d.language == "mixed"]
    strict = run(tmp_path, sources, language={"keep": ["en"]})
    assert len(kept(strict)) == len(kept(layout)) - 1


@pytest.mark.parametrize("language", ["xx", "en"])
def test_nothing_is_left(tmp_path: Path, language: str) -> None:
    """The message names a command that tells why, and it does."""
    sources = [source(tmp_path, "web", texts(3) if language == "xx" else [])]
    with pytest.raises(UserError, match=r"no document is left .*`qwen2 corpus report .*out`"):
        run(tmp_path, sources, language={"keep": [language]}, tokens={})
    from qwen2.pipeline.corpus.run import report

    layout = Layout.open(tmp_path / "out")
    with open_workers(1) as workers:
        report(layout, workers)
    assert totals(layout).get("rules", 0) == (3 if language == "xx" else 0)


def test_a_run_that_is_not_finished_says_so(tmp_path: Path) -> None:
    layout = run(tmp_path, [source(tmp_path, "web", texts(3))])
    name = kept(layout)[0].id
    for part in layout.parts:
        layout.file("fates", part).unlink()
    with pytest.raises(UserError, match="not made yet; run the recipe to its end"):
        life_of(layout, name)


def test_a_statistic_that_is_no_number_drops_nothing(tmp_path: Path) -> None:
    """An empty text has no shares of anything."""
    sources = [source(tmp_path, "web", [*texts(2), {"text": "\u200b"}], language="en")]
    rules = [{"name": "r", "statistic": "mean_word_length", "least": 1}]
    layout = run(
        tmp_path, sources, filters={"plain": {"rules": {"rules": rules}}}, shortest=0, language=None
    )
    assert sum(totals(layout).values()) == 3
    assert (layout.folder / PAGE).exists()


def test_what_the_linear_classifier_has_no_score_for_models_read() -> None:
    """A rule is failed by numbers only, as everywhere."""

    def linear(texts: list[str], languages: list[str]) -> dict[str, Any]:
        return {"quality": np.array([0.9, np.nan, 0.1])}

    def head(texts: list[str], languages: list[str]) -> dict[str, Any]:
        return {"head": np.arange(len(texts), dtype=float)}

    class Recipe:
        bulk = Rule(name="bulk", statistic="quality", least=0.5)

    scorers: list[Callable[..., Any]] = [linear, head]
    found = score._scores(["a", "b", "c"], ["en"] * 3, scorers, Recipe())  # type: ignore[arg-type]
    np.testing.assert_array_equal(found["head"], [0, 1, np.nan])


@pytest.mark.parametrize(
    ("least", "greatest"),
    [(None, -2.0), (-3.0, None), (-5.0, 0.0), (0.0, None), (0.1, 90.0), (2, 2)],
)
def test_edges_ascend_around_any_limits(least: float | None, greatest: float | None) -> None:
    edges = edges_of(Rule(name="r", statistic="s", least=least, greatest=greatest))
    assert len(edges) == BINS + 1
    assert (np.diff(edges) > 0).all()
    for limit in (least, greatest):
        assert limit is None or edges[0] <= limit <= edges[-1]


def test_sources_with_other_limits_are_counted_between_the_same_edges(tmp_path: Path) -> None:
    filters = {
        name: {"rules": {"rules": [{"name": "w", "statistic": "words", "least": least}]}}
        for name, least in (("plain", 10), ("strict", 40))
    }
    sources = [
        source(tmp_path, "web", texts(4)),
        source(tmp_path, "books", texts(4, seed=2), filters="strict"),
    ]
    layout = run(tmp_path, sources, filters=filters)
    counted = json.loads((layout.folder / SUMMARY).read_text())["histograms"]["words"]
    assert counted["edges"] == edges_of(axes(layout.recipe)["words"]).tolist()
    assert sum(counted["kept"]) + sum(counted["dropped"]) == 8
    assert sum(counted["kept"][-1:]) == 8, "all are longer than 40 words"


def test_more_splits_than_have_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "MOST_SPLITS", 1)
    sources = [source(tmp_path, "web", texts(1)), source(tmp_path, "books", texts(1))]
    with pytest.raises(UserError, match="2 splits, a run at most 1"):
        run(tmp_path, sources)
