"""What trained scorers are worth: figures as JSON, and a page with histograms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2.common.files import durable_write
from qwen2.common.plot import line_chart
from qwen2.corpus.mixing_law import spearman
from qwen2.corpus.quality.calibrate import Calibration
from qwen2.corpus.quality.labels import GOOD, Example
from qwen2.corpus.quality.measure import ALL, by_language
from qwen2.corpus.quality.scorer import QUALITY
from qwen2.pipeline.quality.examples import targets_of
from qwen2.pipeline.quality.scorers import BITS, HEAD, PERPLEXITY
from qwen2.pipeline.report import STYLE

JSON, PAGE = "quality.json", "quality.html"
BINS = 50
SHOWN = 0.995  # of the scores: a perplexity's last few would press the others together
KEPT = 0.3  # share that the example of one threshold keeps
FEW = 20  # documents of a language below which its share says nothing
TITLES = {
    QUALITY: "linear classifier",
    HEAD: "head",
    PERPLEXITY: "perplexity",
    BITS: "bits per byte",
}

Scores = Mapping[str, NDArray[np.float64]]


def compare(
    columns: Scores,
    examples: Sequence[Example],
    reference: tuple[Scores, Sequence[Example]],
    least: int,
) -> dict[str, Any]:
    """Agreement with held-out labels by language, of scorers with each other, and shares kept.

    Args:
        columns: raw scores of `examples`, which were held out.
        reference: the same of the sample for percentiles.
        least: documents that a language needs for percentiles of its own.
    """
    targets, languages = targets_of(examples), [each.language for each in examples]
    worth = {name: better(name, values) for name, values in columns.items()}
    known = np.logical_and.reduce([np.isfinite(values) for values in worth.values()])
    agreed = {
        name: {
            language: found.model_dump(exclude=set() if name in (QUALITY, HEAD) else {"accuracy"})
            for language, found in by_language(
                values[known],
                targets[known],
                [x for x, k in zip(languages, known, strict=True) if k],
            ).items()
        }
        for name, values in worth.items()
    }
    names = list(worth)
    ranked = {a: {b: spearman(worth[a][known], worth[b][known]) for b in names} for a in names}
    return {
        "agreement": agreed,
        "rank_correlation": ranked,
        "kept": kept_shares(*reference, least),
    }


def better(name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """`values`, turned round where a low one is the better: a predictable text."""
    return -values if name in (PERPLEXITY, BITS) else values


def kept_shares(columns: Scores, examples: Sequence[Example], least: int) -> dict[str, Any]:
    """What one threshold that keeps `KEPT` of all keeps of each language: raw and by percentile.

    The percentiles come of every other document, the shares of those between.
    """
    languages = np.array([each.language for each in examples], dtype=object)
    fitted, asked = slice(0, None, 2), slice(1, None, 2)
    calibration = Calibration.fit(
        {name: values[fitted] for name, values in columns.items()},
        [str(x) for x in languages[fitted]],
        max(1, least // 2),
    )
    found: dict[str, Any] = {}
    for name, values in columns.items():
        of_it = {"raw": values[asked]}
        names = [str(x) for x in languages[asked]]
        of_it["percentile"] = calibration.percentiles(name, of_it["raw"], names)
        kept = {
            how: better(name, scores) >= np.nanquantile(better(name, scores), 1 - KEPT)
            for how, scores in of_it.items()
        }
        kinds, counts = np.unique(languages[asked].astype(str), return_counts=True)
        found[name] = {
            str(kind): {
                "documents": int(count),
                "own": str(kind) in calibration.tables[name],
                **{
                    how: float(which[languages[asked] == kind].mean())
                    for how, which in kept.items()
                },
            }
            for kind, count in sorted(zip(kinds, counts, strict=True), key=lambda p: -p[1])
            if count >= FEW
        }
    return found


def write_results(
    folder: Path, figures: Mapping[str, Any], columns: Scores, examples: Sequence[Example]
) -> None:
    """Write quality.json and quality.html."""
    durable_write(folder / JSON, json.dumps(figures, indent=1, ensure_ascii=False).encode())
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Quality</title><style>{STYLE}</style><body><h1>Scorers of quality</h1>"
        f"{''.join(sections(figures, columns, examples))}</body></html>"
    )
    durable_write(folder / PAGE, page.encode())


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
