"""The quickstart on a few kilobytes: every stage, the page, and the exported model."""

from __future__ import annotations

import html.parser
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

from qwen2.common.errors import UserError
from qwen2.common.recipes import find_recipe
from qwen2.corpus.filters import unicode
from qwen2.evaluate.positions import LABELS
from qwen2.model.attention import PackedAttention
from qwen2.model.hub import load
from qwen2.pipeline.corpus import CorpusRecipe, Layout
from qwen2.pipeline.quickstart import STAGES, QuickRun, QuickstartRecipe, terminal_summary
from qwen2.pipeline.report import read_metrics, write_report
from qwen2.pipeline.stages import run_stages

SMALL = [
    "minutes=5",
    "max_steps=6",
    "dtype=fp32",  # some CPUs have no kernels for bf16
    "corpus.megabytes={code: 0.4, docstrings: 0.2, reference: 0.2, prose: 0.3, multilingual: 0.2}",
    "vocab_size=600",
    "tokenizer_megabytes=0.4",
    "model.vocab_size=640",
    "model.hidden_size=48",
    "model.intermediate_size=64",
    "model.num_hidden_layers=2",
    "model.max_position_embeddings=64",
    "context=64",
    "long_context=256",
    "upcycle={experts: 4, experts_per_token: 2, expert_size: 16, shared_size: 64}",
    "rows=2",
    "evaluated_kilobytes=4",
    "watched_tokens=256",
    "reserve_seconds=0",
]


def recipe(*overrides: str) -> QuickstartRecipe:
    return QuickstartRecipe.load(find_recipe("quickstart"), [*SMALL, *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> QuickRun:
    return run_stages(STAGES, tmp_path_factory.mktemp("quick") / "run", recipe())


def test_every_stage_leaves_its_result(run: QuickRun) -> None:
    assert list(run.results) == [stage.name for stage in STAGES]
    assert [run.results[s]["steps"] for s in ("pretrain", "long_context", "mixture")] == [6, 6, 6]
    bits = run.results["evaluate"]["bits_per_byte"]
    assert set(bits) == set(run.results["evaluate"]["bytes"]) >= {"code", "docstrings"}
    assert all(0 < value < 20 for values in bits.values() for value in values.values())


def test_the_long_context_is_trained_and_measured(run: QuickRun) -> None:
    result = run.results["long_context"]
    assert (result["trained_length"], result["length"]) == (64, 256)
    assert set(result["positions"]) == {"before", "after"}
    assert set(result["methods"]) == set(LABELS.values())
    for by in (*result["positions"].values(), *result["methods"].values()):
        assert by["edges"][-1] == 256
        assert all(0 < nats < 20 for nats in by["nats"])
    config = load(run.folder / "model")[0].config
    assert (config.rope_theta, config.max_position_embeddings) == (1_000_000.0, 256)
    # Within the trained length plain RoPE and both ways of DCA are one and the same.
    first = [result["methods"][name]["nats"][0] for name in ("plain RoPE", "DCA", "DCA + YARN")]
    assert first == pytest.approx([first[0]] * 3, rel=1e-3)


def test_the_dense_model_is_upcycled_and_trained(run: QuickRun) -> None:
    result = run.results["mixture"]
    model, _ = load(run.folder / result["model"])
    start, _ = load(run.folder / "mixture" / "start")
    assert model.config.moe == start.config.moe
    assert model.config.moe is not None
    assert model.config.moe.num_experts == 4
    assert sum(result["expert_share"]) == pytest.approx(1, abs=1e-4)
    assert result["dropped"] == 0
    assert result["active_parameters"] < result["parameters"] == model.config.num_parameters()
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(model.state_dict()[gate], start.state_dict()[gate])
    assert list(result["bits_per_byte"]) == ["dense", "upcycled", "trained further"]


def times(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


class Page(html.parser.HTMLParser):
    """What a page fetches or runs."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.resources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.resources += [v or "" for k, v in attrs if k in ("src", "href", "data")]


def test_the_report_is_one_page_without_scripts_or_resources(run: QuickRun) -> None:
    """It names one file, the page of the corpus beside it, and only for a click to go there."""
    text = (run.folder / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert page.resources == ["corpus/report.html"]
    assert page.tags.count("a") == 1
    assert "<h1>What became of the text</h1>" in (run.folder / page.resources[0]).read_text()
    assert page.tags.count("svg") == 7
    assert "url(" not in text
    assert "xz -9" in text


def test_markup_in_the_model_s_words_is_shown_not_run(run: QuickRun, tmp_path: Path) -> None:
    results = json.loads(json.dumps(run.results))
    results["talk"]["samples"][0]["text"] = "<script>alert(1)</script>"
    metrics = run.folder / results["pretrain"]["metrics"]
    (tmp_path / "pretrain").mkdir()
    (tmp_path / results["pretrain"]["metrics"]).write_bytes(metrics.read_bytes())
    write_report(tmp_path, results, run.recipe.model_dump(mode="json"))
    assert "<script" not in (tmp_path / "report.html").read_text()


def test_the_terminal_gets_one_screenful(run: QuickRun) -> None:
    lines = terminal_summary(run).splitlines()
    assert len(lines) <= 28
    assert any("zstd -19" in line for line in lines)
    assert any(line.endswith("corpus/report.html") for line in lines)


@torch.no_grad()
def test_transformers_loads_the_export_with_equal_logits(run: QuickRun) -> None:
    folder = run.folder / "model"
    model, tokenizer = load(folder, dtype="fp32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = "def main():\n    return 'écriture'\n"
    ids = tokenizer.encode(text)
    assert transformers.AutoTokenizer.from_pretrained(folder)(text)["input_ids"] == ids
    tokens = torch.tensor(ids)
    ours = model(tokens, torch.arange(len(ids)), PackedAttention([len(ids)]))
    torch.testing.assert_close(ours, theirs(tokens[None]).logits[0], atol=1e-5, rtol=1e-5)


def test_a_second_start_does_nothing_again(run: QuickRun) -> None:
    before = times(run.folder)
    again = run_stages(STAGES, run.folder, recipe())
    assert again.results == run.results
    assert before == times(run.folder)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("corpus.megabytes={prosa: 1}", "no source is called 'prosa'; there are code, docstrings"),
        ("corpus.recipe=corpus/labtop", "did you mean 'corpus/laptop'"),
        ("corpus.tokens={tokenizer: qwen2}", "corpus.tokens must be null"),
        ("corpus.held_outt=0.1", "did you mean 'held_out'"),
    ],
)
def test_a_wrong_corpus_is_told_at_once(override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        recipe(override)


def test_the_corpus_is_the_shipped_one_with_other_limits(run: QuickRun) -> None:
    """Saved whole: nothing of a run depends on a recipe that may change."""
    saved = yaml.safe_load((run.folder / "recipe.yaml").read_text())["corpus"]
    limits = {source["name"]: source["limit"]["megabytes"] for source in saved["sources"]}
    assert limits["code"] == 0.4
    assert CorpusRecipe.parse(saved) == run.recipe.corpus
    shipped = CorpusRecipe.load(find_recipe("corpus/laptop"))
    assert run.recipe.corpus.filters == shipped.filters
    assert run.results["collect"]["kinds"].keys() == limits.keys()
    assert Layout.open(run.folder / "corpus").keys == Layout(run.folder, run.recipe.corpus).keys


def test_without_the_extra_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    unicode._fixer.cache_clear()  # another test may have imported it
    monkeypatch.setattr("qwen2.pipeline.quickstart.data.available_cores", lambda: 1)
    with pytest.raises(UserError, match=r"pip install 'qwen2\[corpus\]'"):
        run_stages(STAGES[:1], tmp_path / "run", recipe())


def test_too_little_time_is_said_before_training(tmp_path: Path) -> None:
    """On any machine: what is kept for later is all there is."""
    short = recipe("minutes=1", "reserve_seconds=60")
    with pytest.raises(UserError, match=r"minutes 1: .* 60 s are kept .* give more minutes"):
        run_stages(STAGES[:4], tmp_path / "run", short)
    assert not (tmp_path / "run" / "pretrain").exists()


def test_a_signal_during_training_stops_the_run_and_it_goes_on(
    run: QuickRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after SIGTERM: training has saved itself; the second start trains the rest."""
    from dataclasses import replace

    from qwen2.pipeline.stages import Stopped
    from qwen2.train.loop import Run

    train, folder = Run.train, tmp_path / "run"

    def interrupted(self: Run, steps: int) -> bool:
        train(self, 3)  # saves itself at its end
        return False

    with monkeypatch.context() as patched, pytest.raises(Stopped, match="saved"):  # noqa: PT012
        patched.setattr(Run, "train", interrupted)
        run_stages(STAGES[:4], folder, recipe())
    resumed = run_stages(STAGES[:4], folder, recipe())

    def losses(some: QuickRun) -> list[float]:
        path = some.folder / some.results["pretrain"]["metrics"]
        return [line["loss"] for line in read_metrics(path) if "loss" in line]

    assert len(losses(resumed)) == 6
    assert losses(resumed) == pytest.approx(losses(replace(resumed, folder=run.folder)), rel=1e-3)


def test_a_stage_killed_before_its_result_was_written_is_run_again(
    run: QuickRun, tmp_path: Path
) -> None:
    """Its folder is there already, and whole; what came before it stays."""
    folder = tmp_path / "run"
    run_stages(STAGES[:3], folder, recipe())
    kept = times(folder / "corpus")
    (folder / "stages" / "tokenizer.json").unlink()
    (folder / "stages" / "shards.json").unlink()
    again = run_stages(STAGES[:3], folder, recipe())
    assert again.results["shards"]["tokens"] == run.results["shards"]["tokens"]
    assert times(folder / "corpus") == kept
