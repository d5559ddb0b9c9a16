"""The report of a corpus: summary.json, and one self-contained page without scripts."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from qwen2.common.files import durable_write
from qwen2.common.html import html_page
from qwen2.common.plot import histogram_chart
from qwen2.pipeline.corpus import examples
from qwen2.pipeline.corpus.fates import FATES, axes
from qwen2.pipeline.corpus.flow import (
    by_kind,
    by_language,
    by_source,
    flow,
    megabytes,
    share,
    table,
    total_by_fate,
)
from qwen2.pipeline.corpus.keep import SIDES
from qwen2.pipeline.corpus.layout import Layout
from qwen2.pipeline.corpus.recipe import CorpusRecipe
from qwen2.pipeline.corpus.why import FATES as SAID
from qwen2.pipeline.stages import Run

SUMMARY, PAGE = "summary.json", "report.html"
STYLE = """
body{max-width:66rem}
details{margin:.3rem 0}summary{cursor:pointer}mark{background:#ffd54a;color:#222}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(22rem,1fr));gap:.6rem}
.charts figure{margin:0}.charts figcaption{color:var(--soft);font-size:.85rem}
"""

Figures = Mapping[str, Any]


def write_report(layout: Layout, counts: Figures) -> dict[str, Any]:
    """Write summary.json and report.html into the run's folder; what both begin with.

    Args:
        counts: of all parts, see `fates.count_part`.
    """
    totals = total_by_fate(counts)
    summary = {"totals": totals, "tokens": _tokens(layout), **counts}
    data = json.dumps(summary, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    durable_write(layout.folder / SUMMARY, data.encode())
    durable_write(layout.folder / PAGE, page(layout, summary).encode())
    return {"totals": totals, "tokens": summary["tokens"]}


def terminal_summary(run: Run[CorpusRecipe]) -> str:
    """What a person at the terminal wants to know of a run: one screenful."""
    report = run.results["report"]
    totals = report["totals"]
    documents = sum(n for n, _ in totals.values())
    size = sum(b for _, b in totals.values())
    lines = [f"{documents:,} documents, {megabytes(size)} MB read", ""]
    for fate in FATES:
        count, of = totals.get(fate, [0, 0])
        lines.append(
            f"{fate:<14}{count:>10,}{megabytes(of):>12} MB {share(of, size):>7}  {SAID[fate]}"
        )
    for side, kinds in report["tokens"].items():
        lines.append(f"tokens, {side:<10}{sum(kinds.values()):>14,}")
    return "\n".join([*lines, "", f"report   {run.folder / PAGE}"])


def page(layout: Layout, summary: Figures) -> str:
    """The page."""
    sources, kinds = by_source(summary["fates"]), by_kind(summary["fates"])
    body = [
        *_tiles(summary),
        "<h2>By source</h2>",
        *flow("source", sources),
        "<h2>By language</h2>",
        *flow("language", by_language(summary["fates"])),
        *(("<h2>By kind</h2>", *flow("kind", kinds)) if set(kinds) != set(sources) else ()),
        *_reasons(layout, summary["reasons"]),
        *_histograms(layout, summary["histograms"]),
        *_labels(summary["labels"]),
        *_edits(summary["edits"]),
        *_clusters(layout),
        *_contamination(layout),
        *_samples(layout),
        *_quarantine(layout, summary["quarantine"]),
        *mixture_of(layout.folder),
        *_how(layout),
    ]
    return html_page("Corpus", body, STYLE)


def _tokens(layout: Layout) -> dict[str, Any]:
    if not layout.has("tokens"):
        return {}
    found = {}
    for side in SIDES:
        index = layout.place("tokens") / side / "shards.json"
        if index.exists():
            found[side] = json.loads(index.read_text())["tokens_by_kind"]
    return found


def _tiles(summary: Figures) -> list[str]:
    totals = summary["totals"]
    documents = sum(n for n, _ in totals.values())
    size = sum(b for _, b in totals.values())
    kept = [totals.get(side, [0, 0]) for side in ("train", "held_out")]
    tiles = {
        "documents read": f"{documents:,}",
        "megabytes read": megabytes(size),
        "documents kept": f"{sum(n for n, _ in kept):,}",
        "megabytes kept": megabytes(sum(b for _, b in kept)),
        "held out": f"{kept[1][0]:,}",
    }
    if summary["tokens"]:
        tokens = sum(sum(of.values()) for of in summary["tokens"].values())
        tiles["tokens"] = f"{tokens / 1e6:,.2f}M"
    shown = "".join(f"<div class=tile><b>{v}</b><span>{k}</span></div>" for k, v in tiles.items())
    return ["<h1>What became of the text</h1>", f"<div class=tiles>{shown}</div>"]


def _reasons(layout: Layout, reasons: Figures) -> list[str]:
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for of in reasons.values():
        for rule, (documents, alone) in of.items():
            sums[rule][0] += documents
            sums[rule][1] += alone
    if not sums:
        return []
    shown = examples.dropped_examples(layout)
    parts = [
        "<h2>Why the rules dropped documents</h2>",
        "<p class=quiet>Of each rule: documents that fail it; those that fail no other.</p>",
    ]
    for rule, (documents, alone) in sorted(sums.items(), key=lambda item: -item[1][0]):
        blocks = "".join(
            f"<p class=quiet>{escape(e['id'])}: {escape(e['evidence'])}</p>"
            f"<pre>{escape(e['text'])}</pre>"
            for e in shown.get(rule, ())
        )
        parts.append(
            f"<details><summary><code>{escape(rule)}</code> {documents:,} documents, "
            f"{alone:,} by it alone</summary>{blocks}</details>"
        )
    return parts


def _histograms(layout: Layout, histograms: Figures) -> list[str]:
    rules = axes(layout.recipe)
    charts = []
    for name, of in histograms.items():
        marks = [m for m in (rules[name].least, rules[name].greatest) if m is not None]
        series = {"kept": of["kept"], "dropped": of["dropped"]}
        charts.append(f"<figure>{histogram_chart(of['edges'], series, marks, name)}</figure>")
    if not charts:
        return []
    return [
        "<h2>Measures and thresholds</h2>",
        "<p class=quiet>Documents that all rules together keep and drop; dashed: the rule's limit "
        "(languages and sources may have others). What lies beyond the axis counts at its end.</p>",
        f"<div class=charts>{''.join(charts)}</div>",
    ]


def _labels(labels: Figures) -> list[str]:
    if not labels:
        return []
    order = sorted(labels.items(), key=lambda item: -item[1][0])
    rows = [[name, f"{n:,}", f"{wrong:,}", share(wrong, n)] for name, (n, wrong) in order]
    return [
        "<h2>Labels of languages, checked</h2>",
        table(["label", "documents", "text says otherwise", "share"], rows),
    ]


def _edits(edits: Figures) -> list[str]:
    rows = [[name, f"{n:,}", f"{times:,}"] for name, (n, times) in sorted(edits.items())]
    return ["<h2>Edits</h2>", table(["what", "documents", "times"], rows)] if rows else []


def _clusters(layout: Layout) -> list[str]:
    parts = []
    for cluster in examples.largest_clusters(layout):
        members = "".join(
            f"<p class=quiet>{escape(m['id'])}"
            f"{', stays' if m['kept'] else ''}{', of an older set' if m['older'] else ''}, "
            f"similarity {m['similarity']:.2f}</p><pre>{escape(m['text'])}</pre>"
            for m in cluster["members"]
        )
        parts.append(
            f"<details><summary>{cluster['size']:,} documents like "
            f"<code>{escape(cluster['cluster'])}</code></summary>{members}</details>"
        )
    return ["<h2>Largest clusters of duplicates</h2>", *parts] if parts else []


def _contamination(layout: Layout) -> list[str]:
    if not layout.has("contamination"):
        return []
    parts = [
        f"<details open><summary><code>{escape(hit['id'])}</code> has {hit['share']:.0%} of "
        f"<code>{escape(hit['item'])}</code> ({hit['length']} tokens in common)</summary>"
        f"<pre>… {escape(hit['before'])}<mark>{escape(hit['inside'])}</mark>"
        f"{escape(hit['after'])} …</pre><p class=quiet>Asked:</p><pre>{escape(hit['asked'])}</pre>"
        "</details>"
        for hit in examples.contamination(layout)
    ]
    return ["<h2>Contamination, with the evidence</h2>", *(parts or ["<p>None found.</p>"])]


def _samples(layout: Layout) -> list[str]:
    parts = [
        f"<details><summary>{SAID[fate]}</summary>"
        + "".join(
            f"<p class=quiet>{escape(row['id'])}, {escape(row['language'] or 'no language')}</p>"
            f"<pre>{escape(row['text'])}</pre>"
            for row in rows
        )
        + "</details>"
        for fate, rows in examples.kept_and_lost(layout).items()
    ]
    return ["<h2>Documents drawn at random</h2>", *parts]


def _quarantine(layout: Layout, quarantine: Figures) -> list[str]:
    if not any(quarantine.values()):
        return []
    rows = [
        [source, reason, f"{count:,}"]
        for source, of in quarantine.items()
        for reason, count in sorted(of.items(), key=lambda item: -item[1])
    ]
    blocks = "".join(
        f"<p class=quiet>{escape(row['reason'])}: {escape(row['place'])}</p>"
        f"<pre>{escape(row['excerpt'] or '')}</pre>"
        for row in examples.quarantined(layout)
    )
    return [
        "<h2>Quarantine: what could not be read</h2>",
        table(["source", "reason", "things"], rows),
        f"<details><summary>Some of it</summary>{blocks}</details>",
    ]


def mixture_of(folder: Path) -> list[str]:
    """The search for a mixture, when it was made in `mixture/` of the run's `folder`."""
    path = folder / "mixture" / "mixture.json"
    if not path.exists():
        return []
    from qwen2.pipeline.mixture.page import sections  # brings torch; most runs have none

    return ["<h1>Which mixture to train on</h1>", *sections(json.loads(path.read_text()))]


def _how(layout: Layout) -> list[str]:
    recipe = (layout.folder / "recipe.yaml").read_text(encoding="utf-8")
    return [
        "<h2>How</h2>",
        "<p><code>qwen2 corpus why ID --out "
        f"{escape(Path(layout.folder).name)}</code> tells the life of one document.</p>",
        f"<details><summary>The recipe</summary><pre>{escape(recipe)}</pre></details>",
    ]
