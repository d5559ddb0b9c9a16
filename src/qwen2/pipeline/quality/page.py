"""What trained scorers are worth, on one page: histograms and tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2.common.files import durable_write
from qwen2.common.html import html_page
from qwen2.common.plot import line_chart
from qwen2.corpus.quality.config import BITS, HEAD, PERPLEXITY, QUALITY
from qwen2.corpus.quality.labels import GOOD, Example
from qwen2.corpus.quality.measure import ALL
from qwen2.pipeline.quality.examples import targets_of
from qwen2.pipeline.quality.results import KEPT, Scores

PAGE = "quality.html"
BINS = 50
SHOWN = 0.995  # of the scores: a perplexity's last few would press the others together
TITLES = {
    QUALITY: "linear classifier",
    HEAD: "head",
    PERPLEXITY: "perplexity",
    BITS: "bits per byte",
}


def write_page(
    folder: Path, figures: Mapping[str, Any], columns: Scores, examples: Sequence[Example]
) -> None:
    """Write quality.html."""
    body = ["<h1>Scorers of quality</h1>", *sections(figures, columns, examples)]
    durable_write(folder / PAGE, html_page("Quality", body).encode())


def sections(figures: Mapping[str, Any], columns: Scores, examples: Sequence[Example]) -> list[str]:
    """The parts of a page, to stand in another page too."""
    good = targets_of(examples) >= GOOD
    parts = [
        f'<p class="sub">{len(examples):,} labelled texts that were held out, '
        f"{int(good.sum()):,} of them good.</p>"
    ]
    for name, values in columns.items():
        parts += [
            f"<h2>{escape(TITLES[name].capitalize())}</h2>",
            line_chart(
                histograms({"good": values[good], "bad": values[~good]}),
                name.replace("_", " "),
                "share of the texts",
            ),
        ]
    return [
        *parts,
        *_agreement(figures["agreement"]),
        *_ranks(figures["rank_correlation"]),
        *_costs(figures["costs"]),
        *_kept(figures["kept"]),
    ]


def histograms(groups: Mapping[str, NDArray[np.float64]]) -> dict[str, list[tuple[float, float]]]:
    """Outlines of the histograms of some scores, each summing to 1, over one range."""
    known = {name: values[np.isfinite(values)] for name, values in groups.items()}
    every = np.concatenate(list(known.values()))
    if not len(every):
        return {}
    low, high = float(every.min()), float(np.quantile(every, SHOWN))
    edges = np.linspace(low, high if high > low else low + 1, BINS + 1)
    outlines = {}
    for name, values in known.items():
        shares = np.histogram(values, edges)[0] / max(len(values), 1)
        corners = zip(
            np.repeat(edges, 2)[1:-1].tolist(), np.repeat(shares, 2).tolist(), strict=True
        )
        outlines[name] = list(corners)
    return outlines


def _agreement(agreed: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    names = list(agreed)
    rows = []
    for language, one in agreed[names[0]].items():
        cells = [f"{one['good']:,}", f"{one['bad']:,}"]
        for name in names:
            auc, right = agreed[name][language]["auc"], agreed[name][language].get("accuracy")
            cells.append("–" if auc is None else f"{auc:.3f}")
            if right is not None:
                cells.append(f"{right:.1%}")
        rows.append([language, *cells])
    head = ["language", "good", "bad"]
    for name in names:
        head.append(f"{TITLES[name]}, AUC")
        head += ["right at 0.5"] if "accuracy" in agreed[name][ALL] else []
    return [
        "<h2>Agreement with the labels</h2>",
        "<p>AUC: how often a good text comes before a bad one; 0.5 is chance. Of perplexity and "
        "bits per byte, which know no labels, less is taken for better.</p>",
        _table(head, rows),
    ]


def _ranks(ranked: Mapping[str, Mapping[str, float]]) -> list[str]:
    if len(ranked) == 1:
        return []
    rows = [
        [TITLES[a], *(f"{value:+.3f}" for value in others.values())] for a, others in ranked.items()
    ]
    return [
        "<h2>Agreement with each other</h2><p>Spearman's rank correlation.</p>",
        _table(["", *(TITLES[name] for name in ranked)], rows),
    ]


def _costs(costs: Mapping[str, Mapping[str, float]]) -> list[str]:
    rows = [
        [
            ", ".join(TITLES[column] for column in name.split("+")),
            f"{cost['megabytes']:.2f}",
            f"{cost['seconds']:.1f}",
            f"{cost['seconds'] / cost['megabytes']:.3g}",
        ]
        for name, cost in costs.items()
    ]
    return [
        "<h2>What they cost</h2>",
        _table(["", "MB of text", "seconds", "seconds a MB"], rows),
    ]


def _kept(kept: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    parts = [
        "<h2>One threshold for all languages</h2>",
        f"<p>A threshold that keeps {KEPT:.0%} of the reference sample: what it keeps of each "
        "language by raw scores, and by percentiles, which were fitted on the other half. "
        "Languages with too few documents take the percentiles of all.</p>",
    ]
    for name, shares in kept.items():
        rows = [
            [
                language + ("" if share["own"] else " (as all)"),
                f"{share['documents']:,}",
                f"{share['raw']:.1%}",
                f"{share['percentile']:.1%}",
            ]
            for language, share in shares.items()
        ]
        parts.append(_table([TITLES[name], "documents", "raw", "percentile"], rows))
    return parts


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows
    )
    return f"<table><tr>{titles}</tr>{lines}</table>"
