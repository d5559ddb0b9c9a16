"""A page to look at what was made: counts, and excerpts beside what came of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qwen2.common.files import durable_write
from qwen2.common.html import html_page
from qwen2.synthesis.output import Sample

SHOWN = 4000  # characters of a text
STYLE = """
:root{--good:#2b7a4b;--bad:#b3401f}
@media(prefers-color-scheme:dark){:root{--good:#6cc48f;--bad:#f08a6a}}
body{max-width:76rem}p.sub{overflow-wrap:anywhere}td.text{text-align:left}
article{border:1px solid var(--line);border-radius:.5rem;margin:1rem 0;overflow:hidden}
article header{padding:.4rem .8rem;border-bottom:1px solid var(--line);font-size:.85rem;
overflow-wrap:anywhere}
article header b{margin-right:.6rem}.kept b{color:var(--good)}.rejected b{color:var(--bad)}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(20rem,100%),1fr))}
.sides>div{padding:.6rem .8rem;min-width:0}.sides>div+div{background:var(--box)}
.sides small{color:var(--soft)}
pre{background:none;padding:0;font:.85rem/1.5 system-ui,sans-serif;margin:.3rem 0;
max-height:26rem;overflow-y:auto}
"""


def write_page(path: Path, summary: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Write the page of a run, self-contained and without scripts; all text in it is escaped."""
    model = summary["model"].get("model")
    told = ", ".join(f"{name} {value}" for name, value in summary["model"].items() if value)
    body = [
        "<h1>What was written</h1>",
        f'<p class="sub">{escape(told or "No model was needed.")}</p>',
        _counts(summary["tasks"], bool(model)),
        *(_reasons(name, tally) for name, tally in summary["tasks"].items() if tally["rejected"]),
    ]
    task = None
    for sample in samples:
        if sample.task != task:
            task = sample.task
            body.append(f"<h2>{escape(task)}</h2>")
        body.append(_sample(sample))
    durable_write(path, html_page("Synthesis", body, STYLE).encode())


def _counts(tasks: Mapping[str, Mapping[str, Any]], model: bool) -> str:
    names = ["records", "kept", "rejected", "failed", "bytes"]
    names += ["prompt_tokens", "completion_tokens"] if model else []
    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in ["task", *names])
    rows = []
    for task, tally in tasks.items():
        values = {**tally, "rejected": sum(tally["rejected"].values())}
        cells = "".join(f"<td>{values[name]:,}</td>" for name in names)
        rows.append(f"<tr><td>{escape(task)}</td>{cells}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _reasons(task: str, tally: Mapping[str, Any]) -> str:
    rows = "".join(
        f'<tr><td class="text">{escape(reason)}</td><td>{count:,}</td></tr>'
        for reason, count in tally["rejected"].items()
    )
    return (
        f"<h2>Why of {escape(task)} some were rejected</h2>"
        f"<table><tr><th>reason</th><th>records</th></tr>{rows}</table>"
    )


def _sample(sample: Sample) -> str:
    kept = sample.reason is None
    details = json.dumps(sample.details, ensure_ascii=False) if sample.details else ""
    source = (
        f"<div><small>excerpt</small><pre>{_text(sample.source)}</pre></div>"
        if sample.source
        else ""
    )
    return (
        f'<article class="{"kept" if kept else "rejected"}"><header>'
        f"<b>{escape(sample.reason or 'kept')}</b>{escape(sample.id)} "
        f"<small>{escape(details)}</small></header>"
        f'<div class="sides">{source}'
        f"<div><small>{'document' if kept else 'answer'}</small><pre>{_text(sample.output)}</pre>"
        "</div></div></article>"
    )


def _text(text: str) -> str:
    return escape(text if len(text) <= SHOWN else f"{text[:SHOWN]} …")
