"""The page of a run holds what the metrics say, however the run came about and ends."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.tokens.loader import PackedLoader
from qwen2.train import page as page_module
from qwen2.train.curves import History
from qwen2.train.loop import LoopSettings, Run
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.page import Moment, Page, count, duration, render
from qwen2.train.step import Trainee

RECIPE = {"stage": "pretrain", "out": "/runs/mine", "clip": 1.0, "optimizer": {"lr": 0.01}}


class Parsed(HTMLParser):
    """Texts by the tag they stand in, and all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.texts: dict[str, list[str]] = {}
        self.attributes: list[tuple[str, str, str]] = []
        self._tag = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self._tag, []).append(data)


def lines(
    steps: int, experts: int = 0, stride: int = 1, evaluations: int = 5
) -> Iterator[dict[str, Any]]:
    """Metrics of a run with evaluations and a batch passed over."""
    for step in range(stride, steps + 1, stride):
        line = {
            "step": step, "loss": 2 + 3 / step, "lr": 1e-3, "grad_norm": 0.5 + (step % 7) / 10,
            "tokens": 64 * step, "tokens_per_s": 640.0, "mfu": 0.125, "memory_gb": 1.5,
        }  # fmt: skip
        if experts:
            share = [(1 + (step + e) % 3) / 2 / experts for e in range(experts)]
            line |= {"expert_share": share, "expert_entropy": 0.9, "dropped": 0}
        yield line
        if step == 3 * stride:
            yield {"step": step, "skipped": "loss nan, gradient norm inf"}
        if step % (evaluations * stride) == 0:
            yield {"step": step, "evaluation": {"code": 1 + 1 / step, "prose": 2 + 1 / step}}


def rendered(given: Iterator[dict[str, Any]], steps: int, moment: Moment, **recipe: Any) -> str:
    history = History(steps)
    for line in given:
        history.add(line)
    return render(history, "pretrain", steps, RECIPE | recipe, moment)


def test_the_page_holds_what_the_metrics_say() -> None:
    text = rendered(lines(20, experts=4), 40, Moment("running", 75.0, 3700.0), seed=7)
    page = Parsed(text)
    tiles = re.findall(r"<div class=tile><b>(.*?)</b><span>(.*?)</span></div>", text)
    assert {name: value for value, name in tiles} == {
        "of 40 steps": "20",
        "elapsed": "1 min 15 s",
        "still to go": "1 h 1 min",
        "tokens": "1,280",
        "smoothed loss": f"{_smooth(20):.3f}",
        "tokens/s": "640",
        "MFU": "12.5%",
        "GB, peak": "1.50",
    }
    assert page.texts["h1"] == ["pretrain · mine"]
    assert page.texts["title"] == ["running 20/40 pretrain mine"]
    assert ("i", "style", "width:50.00%") in page.attributes
    titles = page.texts["figcaption"]
    assert titles == [
        "Loss (red: batches passed over)",
        "Gradient norm, before clipping",
        "Learning rate",
        "Held-out text",
        "Speed",
        "Model FLOPs utilisation",
        "Peak memory",
        "Share of each expert, in even shares",
        "Lately, from the most to the least used expert",
        "Evenness of the experts",
    ]
    assert [
        value for tag, name, value in page.attributes if (tag, name) == ("line", "class")
    ].count("mark") == 1
    cells = page.texts["td"]
    assert cells[:8] == [
        "code",
        "1.2000",
        "1.0500",
        "1.0500",
        "prose",
        "2.2000",
        "2.0500",
        "2.0500",
    ]
    assert cells[8:] == ["3", "loss nan, gradient norm inf"]
    assert page.texts["dt"] == ["optimizer.lr", "clip", "seed"]
    assert page.texts["dd"] == ["0.01", "1.0", "7"]
    assert yaml.safe_load(page.texts["pre"][0]) == RECIPE | {"seed": 7}
    assert "1 batch was passed over as not finite, the last after step 3" in text


def test_phases_that_have_begun_are_marked() -> None:
    shape = {"context": 16, "rows": 4, "accumulation": 1}
    phases = [{"steps": 7}, {"tokens": 2 * 5 * 16, "rows": 2}, {"steps": 100}]
    text = rendered(lines(12), 112, Moment("running", 1.0), **shape, phases=phases)
    page = Parsed(text)
    assert page.texts["figcaption"][0] == "Loss (red: batches passed over; dashed: a new phase)"
    classes = [v for tag, name, v in page.attributes if (tag, name) == ("line", "class")]
    assert classes.count("border") == 2  # before steps 7 and 12
    text = rendered(lines(6), 112, Moment("running", 1.0), **shape, phases=phases)
    assert "a new phase" not in text


def _smooth(steps: int) -> float:
    history = History(40)
    for line in lines(steps):
        history.add(line)
    return history.figures.mean("smooth")[-1][1]


def test_every_point_of_the_loss_is_drawn() -> None:
    text = rendered(lines(100), 100, Moment("finished", 1.0))
    smooth, late = re.findall(r'<polyline points="([^"]*)"', text)[:2]
    assert len(smooth.split()) == 100
    assert len(late.split()) == 26  # steps 75 to 100
    assert len(re.findall(r'<polygon points="([^"]*)"', text)[0].split()) == 200  # there and back


@pytest.mark.parametrize("state", ["running", "finished", "stopped", "failed"])
def test_it_loads_itself_again_only_while_the_run_goes_on(state: Any) -> None:
    text = rendered(lines(5), 10, Moment(state, 5.0, reason="it broke" * (state == "failed")))
    assert ("location.reload" in text) == (state == "running")
    assert f"class='state {state}'>{state}<" in text
    assert ("<b>Failed:</b> it broke" in text) == (state == "failed")


def test_nothing_comes_from_elsewhere() -> None:
    text = rendered(lines(50, experts=8), 50, Moment("running", 5.0))
    for _, name, value in Parsed(text).attributes:
        assert name not in ("src", "href", "srcset", "data", "action")
        assert name == "xmlns" or "//" not in value
    assert set(re.findall(r"https?://[^\"'\s]*", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"url\(|@import|fetch\(", text)


def test_text_from_outside_is_escaped() -> None:
    evil = "<script>alert('x')</script>"
    history = History(10)
    history.add({"step": 0, "skipped": evil})
    history.add({"step": 0, "evaluation": {evil: 1.0}})
    recipe = RECIPE | {"out": f"/runs/{evil}", "init": evil, "data": evil}
    text = render(history, evil, 10, recipe, Moment("failed", 1.0, reason=evil))
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert") >= 7


def test_a_million_steps_with_64_experts_stay_small() -> None:
    text = rendered(lines(1_000_000, experts=64, stride=200), 1_000_000, Moment("running", 1e6))
    assert 50_000 < len(text) < 1_000_000
    assert max(len(x.split()) for x in re.findall(r'<polyline points="([^"]*)"', text)) <= 1000


STRANGE = st.sampled_from([0.0, -1.0, 1.0, 1e-30, 1e30, 1e300, -1e300, math.inf, math.nan])


@settings(max_examples=40)
@given(st.lists(st.tuples(*[STRANGE] * 5), max_size=6), STRANGE)
def test_no_figure_is_so_strange_that_there_is_no_page(
    figures: list[tuple[float, ...]], bits: float
) -> None:
    history = History(50)
    for step, (loss, lr, norm, mfu, memory) in enumerate(figures, 1):
        values = {"loss": loss, "lr": lr, "grad_norm": norm, "mfu": mfu, "memory_gb": memory}
        speed = {"tokens": 10 * step, "tokens_per_s": abs(mfu), "expert_share": [0.5, 0.5]}
        history.add({"step": step} | values | speed)
    history.add({"step": len(figures), "evaluation": {"code": bits}})
    Parsed(render(history, "pretrain", 50, RECIPE, Moment("finished", 1.0)))


class Clock:
    """What `time` is to the page: it goes on by hand, and `cost` seconds with every page."""

    def __init__(self, cost: float = 0.0) -> None:
        self.now, self.cost, self.pages = 1000.0, cost, 0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        self.now += self.cost
        self.pages += 1
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(page_module, "time", clock)
    return clock


def open_page(out: Path, given: list[dict[str, Any]], steps: int = 100) -> Page:
    path = out / "metrics.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in given))
    return Page(out, path, "pretrain", steps, RECIPE)


def test_resumed_it_is_the_page_of_an_uninterrupted_run(tmp_path: Path, clock: Clock) -> None:
    given = list(lines(2500, experts=4, evaluations=500))
    pages = []
    for cut in (0, 1, 700, 1800, len(given)):
        page = open_page(tmp_path, given[:cut], 2500)
        for line in given[cut:]:
            page.write(line)
        page.close("finished")
        text = page.path.read_text()
        pages.append(re.sub(r"<b>[^<]*</b><span>elapsed</span>", "", text))
    assert all(text == pages[0] for text in pages)
    assert "2,500" in pages[0]


def test_a_page_every_ten_seconds_and_at_an_evaluation(tmp_path: Path, clock: Clock) -> None:
    page = open_page(tmp_path, [])
    assert clock.pages == 1
    for line in lines(4):
        clock.now += 3
        page.write(line)
    assert clock.pages == 2, "4 steps of 3 s and a batch passed over"
    page.write({"step": 4, "evaluation": {"code": 1.0}})
    assert clock.pages == 3
    assert "1.0000" in page.path.read_text()
    page.close("stopped")
    assert clock.pages == 4


def test_pages_take_a_two_hundredth_of_the_time_at_most(tmp_path: Path, clock: Clock) -> None:
    clock.cost = 0.5
    page = open_page(tmp_path, [])
    began = clock.now
    for line in lines(2000):
        clock.now += 1
        page.write(line)
    assert 0.003 < (clock.pages - 1) * clock.cost / (clock.now - began) <= 0.005


def test_time_that_is_left_is_by_the_pace_of_this_process(tmp_path: Path, clock: Clock) -> None:
    given = list(lines(30, evaluations=30))  # 0.1 s a step, and now 2 s
    page = open_page(tmp_path, given[:21])
    assert page.history.last["step"] == 20
    assert "still to go" not in page.path.read_text()
    for line in given[21:]:
        clock.now += 2 * ("loss" in line)
        page.write(line)
    text = page.path.read_text()
    assert "<b>22 s</b><span>elapsed" in text
    assert "<b>2 min 20 s</b><span>still to go" in text


def test_a_page_that_cannot_be_written_is_said_once_and_ends_nothing(
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(path: Path, data: bytes) -> None:
        raise UserError(f"{path}: the disk is full; nothing was changed")

    monkeypatch.setattr(page_module, "durable_write", full)
    page = open_page(tmp_path, [])
    for line in lines(20):
        clock.now += 20
        page.write(line)
    page.close("finished")
    assert capsys.readouterr().err.count("run.html: the disk is full") == 1


NewTrainee = Callable[..., Trainee]
NewLoader = Callable[..., PackedLoader]


def run(out: Path, trainee: Trainee, loader: Any, steps: int, evaluate: Any = None) -> Run:
    chosen = LoopSettings(evaluate_every=2, checkpoint_every=3)
    run = Run(trainee, loader, chosen, lambda _: 1e-3, out, "test", 1e9, evaluate)
    run.train(steps)
    return run


def test_a_run_leaves_its_page(
    tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    seen = []

    def evaluate(loss: PackedLoss) -> dict[str, Any]:
        seen.append((tmp_path / "run.html").read_text())
        return {"code": 1.5}

    done = run(tmp_path, new_trainee(), new_loader(), 4, evaluate)
    text = (tmp_path / "run.html").read_text()
    assert "location.reload" in seen[0]
    assert "<title>finished 4/4 test </title>" in text
    assert "1.5000" in text
    assert done.metrics._file.closed
    assert not list(tmp_path.glob(".*")), "no half-written page"


def test_a_run_that_fails_says_why(
    tmp_path: Path, new_trainee: NewTrainee, new_loader: NewLoader
) -> None:
    def break_down(loss: PackedLoss) -> dict[str, Any]:
        raise RuntimeError("no\nmore <memory>")

    with pytest.raises(RuntimeError):
        run(tmp_path, new_trainee(), new_loader(), 4, break_down)
    text = (tmp_path / "run.html").read_text()
    assert "<b>Failed:</b> RuntimeError: no more &lt;memory&gt;</p>" in text
    assert "<title>failed 2/4 test </title>" in text
    assert "location.reload" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (3700, "1 h 1 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"), [(512, "512"), (9999, "9,999"), (45_600, "45.6k"), (1.234e12, "1.23T")]
)
def test_counts(number: float, text: str) -> None:
    assert count(number) == text
