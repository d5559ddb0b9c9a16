"""What a search for a mixture leaves: figures as JSON, a page, and a chart."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from qwen2.common.files import durable_write
from qwen2.common.html import html_page
from qwen2.common.plot import bar_chart, scatter_chart, standalone

JSON, PAGE, CHART = "mixture.json", "mixture.html", "predicted.svg"

Figures = Mapping[str, Any]


def write_results(folder: Path, results: Mapping[str, Figures]) -> dict[str, Any]:
    """Write mixture.json, mixture.html and predicted.svg; their names."""
    keys = ("small", "proxies", "fit", "validate")
    values = {key: results[key] for key in keys}
    durable_write(folder / JSON, json.dumps(values, indent=1).encode())
    chart = predicted_chart(results["proxies"], results["fit"])
    durable_write(folder / CHART, standalone(chart).encode())
    body = ["<h1>Which mixture to train on</h1>", *sections(results)]
    durable_write(folder / PAGE, html_page("Mixture", body).encode())
    return {"page": PAGE, "figures": JSON, "chart": CHART, "recipe": "train.yaml"}


def sections(results: Mapping[str, Figures]) -> list[str]:
    """The parts of a page, to stand in another page too."""
    proxies, found, validated = (results[key] for key in ("proxies", "fit", "validate"))
    arms: Figures = validated["mixtures"]
    kinds = list(arms["chosen"])
    return [
        f'<p class="sub">{len(proxies["mixtures"])} proxies of '
        f"{proxies['parameters'] / 1e6:.2f}M parameters besides the embedding; the best mixture "
        f"of the law fitted to them, trained with {len(validated['seeds'])} seeds at "
        f"{validated['parameters'] / 1e6:.2f}M beside its rivals.</p>",
        "<h2>Weights</h2>",
        bar_chart({kind: {arm: arms[arm][kind] for arm in arms} for kind in kinds}, "weight"),
        "<h2>Bits per byte on held-out text</h2>",
        _bits_table(validated, kinds),
        "<h2>What the choice gains</h2>",
        _gain_table(found, validated),
        "<h2>Predicted and measured</h2>",
        "<p>Each dot is a proxy whose bits per byte were predicted by a law fitted without it. "
        f"Rank correlation of the mean: {found['spearman_mean']:.3f}, of a linear law "
        f"{found['spearman_mean_linear']:.3f}.</p>",
        predicted_chart(proxies, found),
        *_law(found, kinds),
    ]


def predicted_chart(proxies: Figures, found: Figures) -> str:
    """Predicted against measured bits per byte of the proxies, by kind."""
    pairs = list(zip(found["predicted_unseen"], proxies["bits_per_byte"], strict=True))
    series = {
        kind: [(predicted[kind], bits[kind]) for predicted, bits in pairs] for kind in pairs[0][0]
    }
    return scatter_chart(series, "predicted bits per byte", "measured")


def _bits_table(validated: Figures, kinds: Sequence[str]) -> str:
    arms = list(validated["mixtures"])
    count = len(validated["seeds"])
    rows = {
        kind: {
            arm: sum(run[kind] for run in validated["bits_per_byte"][arm]) / count for arm in arms
        }
        for kind in kinds
    }
    rows["weighed mean"] = {arm: sum(validated["mean"][arm]) / count for arm in arms}
    return _table(
        ["", *arms],
        [[kind, *(f"{values[arm]:.4f}" for arm in arms)] for kind, values in rows.items()],
        [1 + min(range(len(arms)), key=lambda i: values[arms[i]]) for values in rows.values()],
    )


def _gain_table(found: Figures, validated: Figures) -> str:
    rows = []
    for name, gain in validated["gains"].items():
        expected = found["gains"][name]
        rows.append(
            [
                f"against {name}",
                f"{gain['mean']:+.4f}",
                f"{gain['low']:+.4f} to {gain['high']:+.4f}",
                f"{expected['expected']:+.4f} ({expected['low']:+.4f} to {expected['high']:+.4f})",
                "yes" if gain["beats"] else "not shown",
            ]
        )
    head = ["bits per byte lower", "measured", "95 % interval", "predicted (90 %)", "better"]
    return _table(head, rows)


def _law(found: Figures, kinds: Sequence[str]) -> list[str]:
    """How each kind of text acts on each target, where the law says so."""
    parameters: Figures = found["parameters"]
    if found["law"] != "ExponentialLaw":
        return []
    rows = [
        [
            target,
            f"{parameters[target]['c']:.3f}",
            f"{parameters[target]['a']:.3f}",
            *(f"{parameters[target]['t'][kind]:+.2f}" for kind in kinds),
        ]
        for target in kinds
    ]
    return [
        "<h2>The law</h2><p>L = c + a exp(sum t r), with the mean of t at 0: a source with t below "
        "0 helps that target.</p>",
        _table(["target", "c", "a", *kinds], rows),
    ]


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], best: Sequence[int] | None = None
) -> str:
    cells = []
    for number, row in enumerate(rows):
        marks = [" class=best" if best and best[number] == i else "" for i in range(len(row))]
        cells.append(
            "".join(f"<td{m}>{escape(cell)}</td>" for m, cell in zip(marks, row, strict=True))
        )
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
