"""Stage `fates`: what became of each document, one row each; and what that adds up to.

Every figure is counted from these files, never from what a process remembers: a run that was killed
and begun again has the figures of one that was not.
"""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qwen2.corpus.filters.rules import Rule
from qwen2.pipeline.corpus.duplicates import chosen_rows, unique_rows
from qwen2.pipeline.corpus.judge import read_table, rules_of, write_table
from qwen2.pipeline.corpus.keep import REMAINDER, SIDES, contaminated
from qwen2.pipeline.corpus.layout import DOCUMENTS, QUARANTINE, Layout
from qwen2.pipeline.corpus.recipe import CorpusRecipe

RULES, DUPLICATE, CONTAMINATED, PARAGRAPHS = "rules", "duplicate", "contaminated", "paragraphs"
FATES = (*SIDES, RULES, DUPLICATE, CONTAMINATED, PARAGRAPHS)
"""Kept to train on or held out; dropped by rules, as a duplicate, for a test set's sake, or since
too little was left without its repeated paragraphs."""
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("kind", pa.string()),
        pa.field("language", pa.string()),
        pa.field("bytes", pa.int64()),
        pa.field("fate", pa.string()),
    ]
)
BINS = 40

Figures = dict[str, Any]


def fate_part(layout: Layout, part: str) -> Figures:
    """Write down the fate of each document of `part`."""
    facts = pq.read_table(layout.part(part) / DOCUMENTS, columns=SCHEMA.names[:-1])
    fate = np.full(len(facts), RULES, dtype=object)
    fate[chosen_rows(layout, part)] = DUPLICATE
    unique = unique_rows(layout, part)
    place = layout.place("kept") / part
    short = set(json.loads((place / REMAINDER).read_text()))
    spoilt = contaminated(layout, part)
    for row, name in zip(unique.tolist(), facts["id"].take(unique).to_pylist(), strict=True):
        fate[row] = CONTAMINATED if name in spoilt else PARAGRAPHS if name in short else None
    for side in SIDES:
        rows = pq.read_table(place / f"{side}.parquet", columns=["row"])["row"].to_numpy()
        fate[rows] = side
    assert all(fate), f"{part}: a document without a fate"
    table = facts.append_column(SCHEMA.field("fate"), pa.array(fate.tolist(), pa.string()))
    write_table(layout.file("fates", part), table.cast(SCHEMA))
    return {}


def count_part(layout: Layout, part: str) -> Figures:
    """Figures of one part; those of several are added by `merged`.

    fates: source -> kind -> language -> fate -> [documents, bytes]. reasons: source -> rule ->
    [documents, those that no other rule drops]. labels: label -> [documents, labelled wrongly].
    edits: what -> [documents, times]. histograms: statistic -> {edges, kept, dropped}. quarantine:
    source -> reason -> count.
    """
    source = layout.facts(part).source
    decided = read_table(layout.file("decisions", part))
    facts = pq.read_table(layout.part(part) / DOCUMENTS, columns=["label", "agreement", "edits"])
    reasons = decided["reasons"].to_pylist()
    alone = Counter(of[0] for of in reasons if len(of) == 1)
    failed = Counter(name for of in reasons for name in of)
    bad = pq.read_table(layout.part(part) / QUARANTINE, columns=["reason"])["reason"]
    return {
        "fates": {source: _fates(read_table(layout.file("fates", part)))},
        "reasons": {source: {name: [n, alone[name]] for name, n in failed.items()}},
        "labels": _labels(facts, layout),
        "edits": _edits(facts),
        "histograms": _histograms(layout, part, source, decided["kept"]),
        "quarantine": {source: dict(Counter(bad.to_pylist()))},
    }


def merged(a: Any, b: Any) -> Any:
    """Counts added: dicts key by key, lists place by place, numbers; `edges` stay as they are."""
    if isinstance(a, dict):
        keys = dict.fromkeys([*a, *b])
        return {
            key: a[key] if key == "edges" and key in a else
            merged(a[key], b[key]) if key in a and key in b else a.get(key, b.get(key))
            for key in keys
        }  # fmt: skip
    if isinstance(a, list):
        return [merged(x, y) for x, y in zip(a, b, strict=True)]
    return a + b


def _fates(table: pa.Table) -> Figures:
    keys = ["kind", "language", "fate"]
    counts = table.group_by(keys).aggregate([("bytes", "count"), ("bytes", "sum")])
    found: Figures = {}
    for row in counts.sort_by([(key, "ascending") for key in keys]).to_pylist():
        of_kind = found.setdefault(row["kind"], {})
        of_language = of_kind.setdefault(row["language"] or "none", {})
        of_language[row["fate"]] = [row["bytes_count"], row["bytes_sum"]]
    return found


def _labels(facts: pa.Table, layout: Layout) -> Figures:
    if layout.recipe.language is None:
        return {}
    wrong = pc.less(facts["agreement"], layout.recipe.language.agreement)
    rows = zip(facts["label"].to_pylist(), wrong.to_pylist(), strict=True)
    found: Figures = {}
    for label, is_wrong in rows:
        if label is not None:
            count = found.setdefault(label, [0, 0])
            count[0] += 1
            count[1] += bool(is_wrong)
    return found


def _edits(facts: pa.Table) -> Figures:
    found: Figures = {}
    for text in facts["edits"].drop_null().to_pylist():
        for name, times in json.loads(text).items():
            count = found.setdefault(name, [0, 0])
            count[0] += 1
            count[1] += times
    return found


def _histograms(layout: Layout, part: str, source: str, kept: pa.ChunkedArray) -> Figures:
    """How the statistics that rules read are spread, of what the rules keep and of what they do
    not, each between edges that are the same for all sources."""
    own_rules = {rule.statistic for rule in rules_of(layout.recipe, source) if _bounded(rule)}
    rules = {name: rule for name, rule in axes(layout.recipe).items() if name in own_rules}
    scored = layout.has("scores")
    scores = read_table(layout.file("scores", part)) if scored else pa.table({})
    own = [name for name in rules if name not in scores.column_names]
    numbers = pq.read_table(layout.part(part) / DOCUMENTS, columns=own)
    stays = kept.to_numpy()
    found: Figures = {}
    for name, rule in rules.items():
        column = (scores if name in scores.column_names else numbers)[name]
        values = column.to_numpy().astype(np.float64)
        edges = edges_of(rule)
        inside = np.clip(values, edges[0], edges[-1])
        known = ~np.isnan(values)
        found[name] = {"edges": edges.tolist()} | {
            which: np.histogram(inside[known & chosen], edges)[0].tolist()
            for which, chosen in (("kept", stays), ("dropped", ~stays))
        }
    return found


def _bounded(rule: Rule) -> bool:
    return rule.least is not None or rule.greatest is not None


def axes(recipe: CorpusRecipe) -> dict[str, Rule]:
    """Statistic -> the first rule of the recipe that limits it, around whose limits it is shown.

    Sources may have other limits; their counts are added, so the edges must be the same.
    """
    found: dict[str, Rule] = {}
    for source in recipe.sources:
        for rule in filter(_bounded, rules_of(recipe, source.name)):
            found.setdefault(rule.statistic, rule)
    return found


def edges_of(rule: Rule) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(BINS + 1,) edges around the limits; what lies beyond counts in the outermost bins."""
    limits = [limit for limit in (rule.least, rule.greatest) if limit is not None]
    least, greatest = min(limits), max(limits)
    if least > 0 and greatest / least > 100:
        return np.geomspace(least / 10, greatest * 10, BINS + 1)
    low, high = min(0.0, 4 * least), max(0.0, 4 * greatest)
    return np.linspace(low, high if high > low else 1.0, BINS + 1)
