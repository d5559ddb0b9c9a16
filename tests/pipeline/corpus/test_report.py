"""What a run tells: counts that add up, a page that runs nothing, the life of any document."""

from __future__ import annotations

import html.parser
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import small

from qwen2.cli.main import main
from qwen2.common.errors import UserError
from qwen2.pipeline.corpus import Layout
from qwen2.pipeline.corpus.fates import edges_of, merged
from qwen2.pipeline.corpus.why import life_of
from qwen2.tokens import Shards


@pytest.fixture(scope="module")
def summary(layout: Layout) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((layout.folder / "summary.json").read_text())
    return found


def test_every_document_has_one_fate(layout: Layout, summary: dict[str, Any]) -> None:
    totals = summary["totals"]
    read = sum(layout.facts(part).documents for part in layout.parts)
    assert sum(documents for documents, _ in totals.values()) == read == 30 + 118 + 20
    assert totals["contaminated"][0] == 1
    assert totals["duplicate"][0] == 3
    assert summary["fates"]["code"]["code"]["none"]["rules"][0] == 1
    assert summary["reasons"]["web"]["language"][0] == 1
    assert summary["quarantine"]["web"] == {"not JSON": 1, "text is no string": 1}
    assert summary["labels"]["en"][1] == 1  # the German one
    assert summary["edits"]["email"] == [1, 1]


def test_tokens_are_those_of_the_shards(layout: Layout, summary: dict[str, Any]) -> None:
    shards = Shards(layout.folder / "shards" / "train")
    shards.verify()
    assert sum(summary["tokens"]["train"].values()) == shards.tokens
    assert len(shards) == summary["totals"]["train"][0]
    number = shards.find("books/books.jsonl#1")
    origin = shards.provenance(number)
    assert origin is not None
    assert (origin.part, origin.row) == ("00000-00000", 0)


def test_histograms_hold_every_document(layout: Layout, summary: dict[str, Any]) -> None:
    words = summary["histograms"]["words"]
    assert sum(words["kept"]) + sum(words["dropped"]) == 30 + 118
    assert len(words["edges"]) == len(words["kept"]) + 1


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.resources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.resources += [v or "" for k, v in attrs if k in ("src", "href", "data")]


def test_the_page_is_whole_and_runs_nothing(layout: Layout) -> None:
    text = (layout.folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert not page.resources
    assert "&lt;script&gt;alert(1)" in text
    assert "<mark>A farmer sells forty seven" in text
    for title in ("Measures and thresholds", "Labels of languages", "Quarantine", "Edits",
                  "Largest clusters of duplicates", "By source", "By language"):  # fmt: skip
        assert title in text
    assert page.tags.count("svg") > 10


LIVES = {
    "web/web.jsonl#10": ("contaminated", "contamination", "forty seven baskets"),
    "web/web.jsonl#12": ("rules", "rules", "gopher_top_3_gram: top_3_gram"),
    "web/web.jsonl#14": ("rules", "language", "found de"),
    "web/web.jsonl#7": ("duplicate", "duplicates", "goes, for web/web.jsonl#8 stays, of 2"),
    "web/web.jsonl#8": (None, "duplicates", "stays of 2"),
    "web/web.jsonl#20": (None, "edits", "email 1"),
    "web/web.jsonl#17": (None, "paragraphs", "stays in web/web.jsonl#16"),
}


@pytest.mark.parametrize("name", LIVES)
def test_the_life_of_a_document(layout: Layout, name: str) -> None:
    fate, stage, said = LIVES[name]
    life = life_of(layout, name)
    assert life.fate == fate if fate else life.fate in ("train", "held_out")
    assert said in dict(life.steps)[stage]
    assert life.document.id == name
    assert dict(life.steps)["read"].startswith(life.document.source)


def test_an_unknown_document_is_one_line(layout: Layout) -> None:
    with pytest.raises(UserError, match=r"no document 'web/none'; an id begins with its source"):
        life_of(layout, "web/none")


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit) as exit_:  # noqa: PT012
        patched.setattr(sys, "argv", ["qwen2", "corpus", *arguments])
        main()
    captured = capsys.readouterr()
    return int(exit_.value.code or 0), captured.out, captured.err


def test_the_commands(
    layout: Layout, sources: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, "why", "web/web.jsonl#12", "--out", str(layout.folder), "--json")
    assert code == 0
    assert json.loads(out)["fate"] == "rules"
    code, out, _ = call(capsys, "why", "web/web.jsonl#12", "--out", str(layout.folder), "--text")
    assert code == 0
    assert "dropped by the rules" in out
    assert "Buy now!" in out
    page = (layout.folder / "report.html").read_text()
    code, out, _ = call(capsys, "report", str(layout.folder))
    assert code == 0
    assert (layout.folder / "report.html").read_text() == page
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(json.dumps(small.recipe_values(sources, tokens=None)))
    out_ = str(tmp_path / "out")
    code, out, _ = call(capsys, "run", str(recipe), "--out", out_, "--workers", "1", "--json")
    assert code == 0
    assert json.loads(out)["report"]["totals"]["contaminated"][0] == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "corpus/laptop", "--engine", "spark"], "--engine spark: choose local or ray"),
        (["run", "corpus/labtop"], "did you mean 'corpus/laptop'?"),
        (["run", "corpus/laptop", "held_uot=0.1"], "did you mean 'held_out'?"),
        (["run", "corpus/laptop", "filters={}"], "no filter set is called 'code'"),
        (["why", "web/1"], "give the folder of `qwen2 corpus run`"),
        (["report", "nowhere"], "give the folder of `qwen2 corpus run`"),
    ],
)
def test_wrong_input_is_one_line(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments[0] != "report":
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    code, _, error = call(capsys, *arguments)
    assert code == 2
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_counts_are_added_in_any_order() -> None:
    a = {"n": {"x": [1, 2]}, "h": {"edges": [0, 1], "kept": [3]}}
    b = {"n": {"x": [10, 20], "y": [5, 5]}, "h": {"edges": [0, 1], "kept": [4]}}
    both = {"n": {"x": [11, 22], "y": [5, 5]}, "h": {"edges": [0, 1], "kept": [7]}}
    assert merged(a, b) == merged(b, a) == both
    assert merged({}, a) == a


def test_edges_stand_around_the_limits(layout: Layout) -> None:
    rules = {rule.name: rule for rule in layout.recipe.filters["prose"].in_force.rules}
    words = edges_of(rules["gopher_words"])
    assert words[0] == pytest.approx(5)
    assert words[-1] == pytest.approx(1e6)
    assert edges_of(rules["gopher_top_2_gram"])[-1] == pytest.approx(0.8)
