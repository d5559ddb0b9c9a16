"""How much text there was, and what became of it: sums, bars, a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from qwen2.common.plot import stacked_bars
from qwen2.pipeline.corpus.fates import FATES
from qwen2.pipeline.corpus.why import FATES as SAID

MOST_ROWS = 14  # of a table that is not folded

Figures = Mapping[str, Any]
Counts = dict[str, dict[str, list[int]]]
"""Of what -> fate -> [documents, bytes]."""


def total_by_fate(counts: Figures) -> dict[str, list[int]]:
    """Fate -> [documents, bytes]."""
    return _sum_up(counts["fates"], lambda source, kind, language: "all").get("all", {})


def by_source(fates: Figures) -> Counts:
    """Source -> fate -> [documents, bytes]."""
    return _sum_up(fates, lambda source, kind, language: source)


def by_language(fates: Figures) -> Counts:
    """Language -> fate -> [documents, bytes]."""
    return _sum_up(fates, lambda source, kind, language: language)


def by_kind(fates: Figures) -> Counts:
    """Kind -> fate -> [documents, bytes]."""
    return _sum_up(fates, lambda source, kind, language: kind)


def _sum_up(fates: Figures, name: Any) -> Counts:
    found: Counts = {}
    for source, kinds in fates.items():
        for kind, languages in kinds.items():
            for language, of in languages.items():
                sums = found.setdefault(name(source, kind, language), {})
                for fate, (documents, size) in of.items():
                    before = sums.get(fate, [0, 0])
                    sums[fate] = [before[0] + documents, before[1] + size]
    return found


def flow(name: str, counts: Counts) -> list[str]:
    """Megabytes by fate, as bars and as a table."""
    order = sorted(counts, key=lambda key: -sum(b for _, b in counts[key].values()))
    bars = {
        key: {fate: counts[key].get(fate, [0, 0])[1] / 1e6 for fate in FATES}
        for key in order[:MOST_ROWS]
    }
    rows = []
    for key in order:
        of = counts[key]
        documents, size = (sum(pair[i] for pair in of.values()) for i in (0, 1))
        kept = sum(of.get(side, [0, 0])[1] for side in ("train", "held_out"))
        shares = [share(of.get(fate, [0, 0])[1], size) for fate in FATES[2:]]
        rows.append(
            [key, f"{documents:,}", megabytes(size), *shares, megabytes(kept), share(kept, size)]
        )
    head = [name, "documents", "MB", *FATES[2:], "MB kept", "kept"]
    return [
        stacked_bars(bars, "megabytes"),
        "<p class=quiet>" + "; ".join(f"{fate}: {SAID[fate]}" for fate in FATES) + ".</p>",
        table(head, rows),
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; what does not fit a screen is folded away."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)

    def shown(some: Sequence[Sequence[str]]) -> str:
        cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in some)
        body = "".join(f"<tr>{row}</tr>" for row in cells)
        return f"<div class=scroll><table><tr>{top}</tr>{body}</table></div>"

    if len(rows) <= MOST_ROWS:
        return shown(rows)
    more = f"<details><summary>{len(rows) - MOST_ROWS} more</summary>{shown(rows[MOST_ROWS:])}"
    return f"{shown(rows[:MOST_ROWS])}{more}</details>"


def megabytes(size: float) -> str:
    """Bytes as 10^6 bytes."""
    return f"{size / 1e6:,.2f}"


def share(part: float, whole: float) -> str:
    """A part in per cent; nothing of nothing is a dash."""
    return f"{part / whole:.1%}" if whole else "–"
