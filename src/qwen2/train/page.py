"""A training run as one page, `run.html`: whether it is healthy, at a glance and while it runs.

The page is a file of its own without outside resources, light or dark as the reader's system is.
While the run goes on it loads itself again, and says so when nothing has come for long: a killed
process cannot write that it was killed. It shows what metrics.jsonl says; only times are its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import yaml

from qwen2.common.errors import UserError
from qwen2.common.files import durable_write
from qwen2.common.html import html_page
from qwen2.common.plot import heat_map, line_chart
from qwen2.common.progress import say
from qwen2.train.curves import History, Line
from qwen2.train.health import signs
from qwen2.train.metrics import State
from qwen2.train.phases import Phase, Stretch, lay_out

PAGE = "run.html"

EVERY = 10.0  # seconds between two pages
COST = 0.005  # share of the run's time that pages may take
SILENT = 300  # seconds without a page after which it says so; or 20 steps, when these are long
KEYS = (
    "init", "data", "context", "rows", "accumulation", "optimizer.lr", "optimizer.weight_decay",
    "clip", "schedule.kind", "schedule.warmup", "dtype", "device", "seed",
)  # fmt: skip
"""What of the recipe is always seen."""

LATE_FROM = 40  # points of the loss, from which on its last quarter has a chart of its own
SHARES = (0.25, 0.5, 0.8, 1.25, 2, 4)  # times the even share, where the colours change

STYLE = """
body{max-width:78rem}h1{display:inline-block;margin:0 .8rem 0 0}
.state{display:inline-block;padding:.15rem .8rem;border-radius:1rem;color:#fff;font-weight:650}
.running{background:#3f6fd8}.finished{background:#2b8a5e}.stopped{background:#b07a1e}
.failed,.silent{background:#c8352f}
.bar{background:var(--box);height:.5rem;border-radius:.3rem;margin:.8rem 0}
.bar i{display:block;height:100%;border-radius:.3rem;background:#3f6fd8}
.tile{flex:1 1 5.4rem;padding:.5rem .7rem}.tile b{font-size:1.15rem;white-space:nowrap}
.signs{border-left:.3rem solid #c8352f;background:var(--box);padding:.5rem 1rem;margin:1rem 0}
.signs.good{border-color:#2b8a5e}.signs p{margin:.2rem 0}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(32rem,100%),1fr));gap:.8rem}
.charts figure{margin:0}.charts figcaption{font-weight:600;font-size:.95rem}
details{margin:1rem 0}summary{cursor:pointer}
dl{display:grid;grid-template-columns:repeat(auto-fill,minmax(15rem,1fr));gap:.2rem 1.2rem}
dl div{display:flex;gap:.5rem;overflow-wrap:anywhere}dt{color:var(--soft)}dd{margin:0}
"""

RELOAD = """<script>
const page=document.querySelector('main'),age=document.querySelector('#age');
function tell(){const s=Math.max(0,Math.round(Date.now()/1000-page.dataset.written));
age.textContent=s<100?s+' s ago':Math.round(s/60)+' min ago';
if(s>page.dataset.silent){const b=document.querySelector('.state');
b.className='state silent';b.textContent='silent: did the process die?'}}
tell();setInterval(tell,1000);
setInterval(()=>{if(!document.querySelector('details[open]'))location.reload()},10000);
</script>"""


@dataclass(frozen=True)
class Moment:
    """How things stand when a page is written; times in seconds."""

    state: State
    elapsed: float
    """Since the run began, without the time between its processes."""
    eta: float | None = None
    reason: str = ""
    """Why it failed, in one line."""
    written: float = 0.0
    """Of the clock on the wall, since 1970."""


class Page:
    """Keeps run.html of a run in `out` up to date with its metrics, at next to no cost.

    Args:
        metrics: the file so far, which is read once; what comes later arrives by `write`.
        recipe: keys and values, as in recipe.yaml.
    """

    def __init__(
        self, out: Path, metrics: Path, stage: str, steps: int, recipe: Mapping[str, Any]
    ) -> None:
        self.path, self.stage, self.steps, self.recipe = out / PAGE, stage, steps, recipe
        self.history = History(steps)
        self.history.read(metrics)
        self._start, self._before = self._step, self.history.seconds
        self._began = time.monotonic()
        self._last = self._took = 0.0
        self._unwritable = False
        self._publish("running")

    def write(self, line: Line) -> None:
        """Take in a line of the metrics; a new page when it is time, at once for an evaluation."""
        self.history.add(line)
        since = time.monotonic() - self._last
        wait = 0.0 if "evaluation" in line else EVERY
        if since >= max(wait, self._took / COST):
            self._publish("running")

    def close(self, state: State, reason: str = "") -> None:
        """The last page."""
        self._publish(state, reason)

    @property
    def _step(self) -> int:
        return int(self.history.last.get("step", 0))

    def _publish(self, state: State, reason: str = "") -> None:
        """Write the page. It is only a view: when the disk is full, the run does not end for it."""
        began = time.monotonic()
        here, done = began - self._began, self._step - self._start
        eta = here * (self.steps - self._step) / done if done and state == "running" else None
        moment = Moment(state, self._before + here, eta, reason, time.time())
        text = render(self.history, self.stage, self.steps, self.recipe, moment)
        try:
            durable_write(self.path, text.encode())
        except UserError as error:
            if not self._unwritable:
                say(str(error))
            self._unwritable = True
        self._last = time.monotonic()
        self._took = self._last - began


def render(
    history: History, stage: str, steps: int, recipe: Mapping[str, Any], moment: Moment
) -> str:
    """The page."""
    out = Path(str(recipe.get("out", ""))).name
    step = int(history.last.get("step", 0))
    seconds = history.seconds / step if step else 0.0
    body = [
        f"<main data-written={moment.written:.0f} data-silent={max(SILENT, 20 * seconds):.0f}>",
        f"<h1>{escape(stage)}{f' · {escape(out)}' if out else ''}</h1>",
        f"<span class='state {moment.state}'>{moment.state}</span>",
        f"<span class=quiet> written <span id=age></span></span>{RELOAD}"
        if moment.state == "running"
        else "",
        f"<div class=bar><i style='width:{100 * min(step / steps, 1):.2f}%'></i></div>",
        *_tiles(history, steps, moment),
        *_signs(history, moment),
        "<div class=charts>",
        *_learning(history, recipe),
        *_held_out(history),
        *_machine(history),
        *_experts(history),
        "</div>",
        *_held_out_table(history),
        *_skips(history),
        *_recipe(recipe),
        "</main>",
    ]
    return html_page(f"{moment.state} {step:,}/{steps:,} {stage} {out}", body, STYLE)


def _tiles(history: History, steps: int, moment: Moment) -> Iterable[str]:
    last = history.last
    tiles = {
        f"of {steps:,} steps": f"{last.get('step', 0):,}",
        "elapsed": duration(moment.elapsed),
    }
    if moment.eta is not None:
        tiles["still to go"] = duration(moment.eta)
    if last:
        tiles |= {
            "tokens": count(last["tokens"]),
            "smoothed loss": f"{history.smooth:.3f}",
            "tokens/s": f"{last['tokens_per_s']:,.0f}",
            "MFU": f"{last['mfu']:.1%}",
        }
    if "memory_gb" in last:
        tiles["GB, peak"] = f"{last['memory_gb']:.2f}"
    shown = "".join(f"<div class=tile><b>{v}</b><span>{k}</span></div>" for k, v in tiles.items())
    yield f"<div class=tiles>{shown}</div>"


def _signs(history: History, moment: Moment) -> Iterable[str]:
    if moment.reason:
        yield f"<div class=signs><p><b>Failed:</b> {escape(moment.reason)}</p></div>"
    found = signs(history)
    if found:
        shown = "".join(f"<p>{escape(sign)}</p>" for sign in found)
        yield f"<div class=signs><p><b>Look closer</b></p>{shown}</div>"
    elif history.last and not moment.reason:
        yield "<div class='signs good'><p>No sign of trouble.</p></div>"


def _figure(title: str, chart: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart}</figure>"


def _learning(history: History, recipe: Mapping[str, Any]) -> Iterable[str]:
    figures = history.figures
    smooth, band = figures.mean("smooth"), figures.band("loss")
    last = smooth[-1][0] if smooth else 0
    skips = [step for step, _ in figures.mean("skipped")]
    starts = [step for step in _phase_starts(recipe) if step <= last]
    seen = {"red: batches passed over": skips, "dashed: a new phase": starts}
    legend = "; ".join(name for name, steps in seen.items() if steps)

    def loss_from(first: float) -> str:
        return line_chart(
            {"smoothed": [point for point in smooth if point[0] >= first]},
            "step",
            "nats/token",
            bands={"raw": [point for point in band if point[0] >= first]},
            marks=[step for step in skips if step >= first],
            borders=[step for step in starts if step >= first],
        )

    yield _figure("Loss" + (f" ({legend})" if legend else ""), loss_from(0))
    if len(smooth) >= LATE_FROM:
        yield _figure("Loss, the last quarter", loss_from(last * 0.75))
    levels = {"clipped above": float(recipe["clip"])} if "clip" in recipe else {}
    yield _figure(
        "Gradient norm, before clipping",
        line_chart(
            {"mean": figures.mean("grad_norm")},
            "step",
            "norm",
            bands={"lowest to highest": figures.band("grad_norm")},
            levels=levels,
            logarithmic=True,
        ),
    )
    rate = line_chart({"": figures.mean("lr")}, "step", "", levels={"": 0.0})
    yield _figure("Learning rate", rate)


def _phase_starts(recipe: Mapping[str, Any]) -> list[int]:
    """Steps before the phases of a run, but for the first."""
    phases = [Phase.parse(phase, "phases") for phase in recipe.get("phases", ())]
    if not phases:
        return []
    first = Stretch(0, 0, recipe["context"], recipe["rows"], recipe["accumulation"])
    return [stretch.first for stretch in lay_out(first, phases)[1:]]


def _held_out(history: History) -> Iterable[str]:
    held = history.held_out
    if held.names:
        lines = {name: held.mean(name) for name in held.names}
        yield _figure("Held-out text", line_chart(lines, "step", "bits per byte"))


def _machine(history: History) -> Iterable[str]:
    for name, title, unit in (
        ("tokens_per_s", "Speed", "tokens/s"),
        ("mfu", "Model FLOPs utilisation", "share of the matmul peak"),
        ("memory_gb", "Peak memory", "GB"),
    ):
        if points := history.figures.mean(name):
            yield _figure(title, line_chart({"": points}, "step", unit, levels={"": 0.0}))


def _experts(history: History) -> Iterable[str]:
    shares, figures = history.shares, history.figures
    if not shares.names:
        return
    count_ = len(shares.names)
    rows = {
        name: [(step, share * count_) for step, share in shares.mean(name)] for name in shares.names
    }
    yield _figure(
        "Share of each expert, in even shares",
        heat_map(rows, "step", "expert", SHARES, shares.width),
    )
    last = {name: points[-1][1] for name, points in rows.items()}
    yield _figure(
        "Lately, from the most to the least used expert",
        line_chart(
            {"": list(enumerate(sorted(last.values(), reverse=True), 1))},
            "rank",
            "even shares",
            levels={"": 0.0, "even": 1.0},
        ),
    )
    for name, title, unit in (
        ("expert_entropy", "Evenness of the experts", "entropy, 1 is even"),
        ("balance_loss", "Balance loss", "loss"),
        ("dropped", "Dropped assignments", "a step"),
    ):
        if any(value for _, value in figures.mean(name)):
            yield _figure(title, line_chart({"": figures.mean(name)}, "step", unit))


def _held_out_table(history: History) -> Iterable[str]:
    if not history.evaluations:
        return
    (first_step, first), (last_step, last) = history.evaluations[0], history.evaluations[-1]
    rows = ""
    for name in history.held_out.names:
        best = min((low for _, low, _ in history.held_out.band(name)), default=None)
        cells = (_cell(first.get(name)), _cell(best), _cell(last.get(name)))
        rows += f"<tr><td>{escape(name)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    head = f"<th>step {first_step:,}</th><th>lowest</th><th>step {last_step:,}</th>"
    yield "<h2>Held-out text, bits per byte</h2>"
    yield f"<table class=held><tr><th>domain</th>{head}</tr>{rows}</table>"


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _skips(history: History) -> Iterable[str]:
    if not history.skipped:
        return
    rows = "".join(f"<tr><td>{s:,}</td><td>{escape(why)}</td></tr>" for s, why in history.skips)
    some = f" (the last {len(history.skips)})" if history.skipped > len(history.skips) else ""
    yield f"<details><summary>{history.skipped:,} batches passed over{some}</summary>"
    yield f"<table><tr><th>after step</th><th>why</th></tr>{rows}</table></details>"


def _recipe(recipe: Mapping[str, Any]) -> Iterable[str]:
    values = _leaves(recipe)
    shown = "".join(
        f"<div><dt>{key}</dt><dd>{escape(str(values[key]))}</dd></div>"
        for key in KEYS
        if values.get(key) is not None
    )
    whole = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
    yield f"<h2>Recipe</h2><dl>{shown}</dl>"
    yield f"<details><summary>All of it</summary><pre>{escape(whole)}</pre></details>"


def _leaves(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{before}{key}.")
        else:
            leaves[f"{before}{key}"] = value
    return leaves


def duration(seconds: float) -> str:
    """Two units at most: `4 s`, `3 min 20 s`, `5 h 4 min`, `2 d 3 h`."""
    for large, small, names in ((86400, 3600, "d h"), (3600, 60, "h min"), (60, 1, "min s")):
        if seconds >= large:
            first, second = names.split()
            return f"{seconds // large:.0f} {first} {seconds % large // small:.0f} {second}"
    return f"{seconds:.0f} s"


def count(number: float) -> str:
    """A large number in three digits or so: `512`, `1.23M`, `45.6B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{number:,.0f}"
