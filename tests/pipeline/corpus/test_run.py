"""The run of a corpus: what is planted is found, nothing is lost by a kill, everywhere the same."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import small

from qwen2.common.errors import UserError
from qwen2.corpus import Document, read_documents
from qwen2.pipeline.corpus import CorpusRecipe, run_corpus
from qwen2.pipeline.corpus.judge import read_table
from qwen2.pipeline.corpus.layout import Layout
from qwen2.pipeline.corpus.why import life_of
from qwen2.pipeline.workers import open_workers

HERE = Path(__file__).parent


def kept(layout: Layout) -> dict[str, Document]:
    found: dict[str, Document] = {}
    for part in layout.parts:
        for side in ("train", "held_out"):
            for document in read_documents(layout.place("kept") / part / f"{side}.parquet"):
                assert document.id not in found
                found[document.id] = document
    return found


def number(name: str) -> int:
    """Its place in the list that it was written from."""
    return int(name.rpartition("#")[2]) - 1


def test_everything_planted_is_found(layout: Layout) -> None:
    there = kept(layout)
    web = {number(i) for i in there if i.startswith("web")}
    reasons: dict[int, list[str]] = {}
    for part in layout.parts:
        if layout.facts(part).source == "web":
            ids = pq.read_table(layout.part(part) / "documents.parquet", columns=["id"])["id"]
            decided = read_table(layout.file("decisions", part))["reasons"].to_pylist()
            reasons |= {number(i): r for i, r in zip(ids.to_pylist(), decided, strict=True)}
    assert len({4, 5} & web) == 1
    assert len({6, 7} & web) == 1
    assert 7 in web  # the longer one
    assert 9 not in web  # contaminated
    assert "gopher_top_3_gram" in reasons[11]
    assert reasons[13][0] == "language"
    assert 30 not in web  # stands in books, which go before
    notices = [d for d in there.values() if small.NOTICE in d.text]
    assert len(notices) == 1
    masked = next(d for i, d in there.items() if i.startswith("web") and number(i) == 19)
    assert "<EMAIL>" in masked.text
    assert "jane.doe" not in masked.text
    assert masked.language == "en"
    code = {number(i) for i in there if i.startswith("code")}
    assert code == set(range(20)) - {2}
    bad = Counter(
        row["reason"]
        for part in layout.parts
        for row in pq.read_table(layout.part(part) / "quarantine.parquet").to_pylist()
    )
    assert bad.total() == 2


def test_the_evidence_of_contamination_is_kept(layout: Layout) -> None:
    hits = [
        row
        for part in layout.parts
        for row in read_table(layout.file("contamination", part)).to_pylist()
    ]
    assert [number(hit["id"]) for hit in hits] == [9]
    assert hits[0]["asked"] == small.QUESTION
    assert "forty seven baskets" in hits[0]["matched"]
    assert hits[0]["share"] == 1


def test_processes_leave_the_same_bytes(sources: Path, layout: Layout, tmp_path: Path) -> None:
    small.run(sources, tmp_path / "out", count=2)
    assert small.contents(tmp_path / "out") == small.contents(layout.folder)


def test_another_size_of_parts_keeps_the_same(
    sources: Path, layout: Layout, tmp_path: Path
) -> None:
    other = small.run(sources, tmp_path / "out", part_megabytes=1)
    assert len(other.parts) < len(layout.parts)
    assert kept(other) == kept(layout)


def test_a_second_run_does_nothing(sources: Path, layout: Layout) -> None:
    """But for the report, which may have been of another recipe."""

    def times() -> dict[Path, int]:
        files = [path for path in layout.folder.rglob("*") if path.is_file()]
        return {path: path.stat().st_mtime_ns for path in files if path.parent != layout.folder}

    before = times()
    small.run(sources, layout.folder)
    assert times() == before


def test_a_relaxed_threshold_reads_no_text_again(sources: Path, tmp_path: Path) -> None:
    strict = small.run(sources, tmp_path / "out")
    before = small.contents(tmp_path / "out")
    filters = {"prose": {"rules": {"rules": []}}, "code": {"measures": "code"}}
    relaxed = small.run(sources, tmp_path / "out", filters=filters)
    assert relaxed.place("documents") == strict.place("documents")
    assert relaxed.place("decisions") != strict.place("decisions")
    after = small.contents(tmp_path / "out")
    assert {name: after[name] for name in before if "/" in name} == {
        name: data for name, data in before.items() if "/" in name
    }
    more = set(kept(relaxed)) - set(kept(strict))
    assert 11 in [number(name) for name in more if name.startswith("web")]
    assert set(kept(relaxed)) > set(kept(strict))


def test_killed_at_any_call_it_leaves_the_same_bytes(
    sources: Path, layout: Layout, tmp_path: Path
) -> None:
    result = subprocess.run(
        [sys.executable, HERE / "killed.py", sources, tmp_path / "out", "3"],
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) >= 20
    assert small.contents(tmp_path / "out") == small.contents(layout.folder)


def test_sources_that_changed_are_refused(sources: Path, tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("web", "books", "code", "tests"):
        (tmp_path / "more" / f"{name}.jsonl").write_bytes((sources / f"{name}.jsonl").read_bytes())
    values = small.recipe_values(tmp_path / "more")
    values["sources"][1]["paths"] = [str(tmp_path / "more" / "w*.jsonl")]
    recipe = CorpusRecipe.parse(values)
    with open_workers(1) as workers:
        run_corpus(recipe, tmp_path / "out", workers)
        (tmp_path / "more" / "www.jsonl").write_text('{"text": "new"}\n')
        (
            tmp_path / "out" / "stages" / f"{Layout(tmp_path, recipe).name('documents')}.json"
        ).unlink()
        with pytest.raises(UserError, match="other files than when this run began"):
            run_corpus(recipe, tmp_path / "out", workers)


def test_an_older_run_counts_as_known(sources: Path, layout: Layout, tmp_path: Path) -> None:
    """Whatever it looked at goes from a new source, near duplicates too; and its paragraphs."""
    rng = random.Random(11)
    old = json.loads((sources / "web.jsonl").read_text().splitlines()[40])["text"]
    rows = [small.prose(rng), old + " And a word more.", small.prose(rng) + "\n\n" + small.NOTICE]
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    values = small.recipe_values(sources)
    source = values["sources"][1] | {"name": "new", "paths": [str(new)]}
    duplicates = {"paragraphs": {}, "older": [str(layout.folder)]}
    found = small.run(
        sources, tmp_path / "out", sources=[source], duplicates=duplicates, tokens=None
    )
    there = kept(found)
    assert sorted(map(number, there)) == [0, 2]
    assert not any(small.NOTICE in document.text for document in there.values())
    life = dict(life_of(found, "new/new.jsonl#2").steps)["duplicates"]
    assert life.startswith("goes, for web/web.jsonl#41 stays")
