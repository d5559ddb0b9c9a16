"""The life of one document: everything that a run did with it, and why."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qwen2.common.errors import UserError
from qwen2.corpus.documents import SCHEMA, Document
from qwen2.corpus.near_duplicates import CLUSTERS
from qwen2.corpus.paragraphs import REPEATED
from qwen2.pipeline.corpus.judge import read_table, rules_of
from qwen2.pipeline.corpus.layout import DOCUMENTS, Layout

MOST_MEMBERS = 8  # of a cluster that are told


@dataclass
class Life:
    """What became of a document, stage by stage."""

    document: Document
    part: str
    row: int
    fate: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Stage, and what it found, in words."""
    facts: dict[str, Any] = field(default_factory=dict)
    """The same as numbers."""


def life_of(layout: Layout, name: str) -> Life:
    """The life of the document with the id `name`.

    Raises:
        UserError: the run has none of this id, or is not finished.
    """
    part, row = _find(layout, name)
    columns = pq.read_table(layout.part(part) / DOCUMENTS).slice(row, 1).to_pylist()[0]
    document = Document.from_row({key: columns[key] for key in SCHEMA.names})
    fate = read_table(layout.file("fates", part), ["fate"])["fate"][row].as_py()
    life = Life(document, part, row, fate)
    _read(life, columns)
    _language(life, columns)
    _edits(life, columns)
    _rules(life, layout, columns)
    _duplicates(life, layout)
    _paragraphs(life, layout)
    _contamination(life, layout)
    life.steps.append(("fate", FATES[fate]))
    return life


FATES = {
    "train": "kept, to train on",
    "held_out": "kept, held out",
    "rules": "dropped by the rules",
    "duplicate": "dropped as a duplicate",
    "contaminated": "dropped, for it holds what a test set asks",
    "paragraphs": "dropped, for too little is left without its repeated paragraphs",
}


def _find(layout: Layout, name: str) -> tuple[str, int]:
    sources = [s.name for s in layout.recipe.sources if name.startswith(f"{s.name}/")]
    for part in layout.parts:
        if layout.facts(part).source in sources:
            ids = pq.read_table(layout.part(part) / DOCUMENTS, columns=["id"])["id"]
            row = pc.index(ids, name).as_py()
            if row >= 0:
                return part, row
    raise UserError(
        f"{layout.folder}: no document {name!r}; an id begins with its source "
        f"({', '.join(s.name for s in layout.recipe.sources)}) and a slash"
    )


def _read(life: Life, columns: dict[str, Any]) -> None:
    life.steps.append(
        (
            "read",
            f"{life.document.source}, {columns['bytes']:,} bytes of kind {life.document.kind}"
            f" (part {life.part}, row {life.row})",
        )
    )


def _language(life: Life, columns: dict[str, Any]) -> None:
    found, label = columns["found_language"], columns["label"]
    if found is None:
        return
    said = f"found {found} ({columns['language_score']:.2f})"
    if label is not None:
        agreement = columns["agreement"]
        said += f"; labelled {label}"
        said += "" if agreement is None else f", of the text {agreement:.0%} agree"
    life.steps.append(("language", f"{said}; holds: {life.document.language}"))
    life.facts["language"] = {
        key: columns[key] for key in ("found_language", "language_score", "label", "agreement")
    } | {"shares": json.loads(columns["languages"])}


def _edits(life: Life, columns: dict[str, Any]) -> None:
    edits = json.loads(columns["edits"] or "{}")
    if edits:
        said = ", ".join(f"{name} {count}" for name, count in edits.items())
        life.steps.append(("edits", said))
    life.facts["edits"] = edits


def _rules(life: Life, layout: Layout, columns: dict[str, Any]) -> None:
    decided = read_table(layout.file("decisions", life.part)).slice(life.row, 1).to_pylist()[0]
    rules = rules_of(layout.recipe, layout.facts(life.part).source)
    numbers = {rule.statistic: columns.get(rule.statistic) for rule in rules}
    if layout.has("scores"):
        scores = read_table(layout.file("scores", life.part)).slice(life.row, 1).to_pylist()[0]
        life.facts["scores"] = scores
        told = (f"{k} {'none' if v is None else f'{v:.4g}'}" for k, v in scores.items())
        life.steps.append(("scores", ", ".join(told)))
        numbers |= {name: scores[name] for name in numbers if name in scores}
    failed = [f"{r}: {e}" for r, e in zip(decided["reasons"], decided["evidence"], strict=True)]
    passed = f"all {len(rules)} passed" if rules else "there are none"
    life.steps.append(("rules", "; ".join(failed) or passed))
    life.facts["rules"] = {"failed": failed, "numbers": numbers}


def _duplicates(life: Life, layout: Layout) -> None:
    if life.fate == "rules":
        return
    name = life.document.id
    table = pq.read_table(layout.place("duplicates") / CLUSTERS)
    own = table.filter(pc.equal(table["id"], name))["cluster"].unique()
    members = table.filter(pc.is_in(table["cluster"], own)).to_pylist()
    life.facts["cluster"] = members
    if not members:
        life.steps.append(("duplicates", "none"))
        return
    keeper = members[0]["cluster"]
    others = [f"{m['id']} ({m['similarity']:.2f})" for m in members if m["id"] != name]
    more = f" and {len(others) - MOST_MEMBERS} more" if len(others) > MOST_MEMBERS else ""
    said = "stays of" if keeper == name else f"goes, for {keeper} stays, of"
    life.steps.append(
        ("duplicates", f"{said} {len(members)}: {', '.join(others[:MOST_MEMBERS])}{more}")
    )


def _paragraphs(life: Life, layout: Layout) -> None:
    if not layout.has("repeated") or life.fate in ("rules", "duplicate"):
        return
    table = pq.read_table(layout.place("repeated") / REPEATED)
    rows = table.filter(pc.equal(table["id"], life.document.id)).to_pylist()
    life.facts["paragraphs"] = rows
    if rows:
        said = ", ".join(f"{row['paragraph']} stays in {row['stays_in']}" for row in rows)
        life.steps.append(("paragraphs", f"without number {said}"))


def _contamination(life: Life, layout: Layout) -> None:
    if not layout.has("contamination") or life.fate in ("rules", "duplicate"):
        return
    table: pa.Table = read_table(layout.file("contamination", life.part))
    hits = table.filter(pc.equal(table["id"], life.document.id)).to_pylist()
    life.facts["contamination"] = hits
    for hit in hits:
        life.steps.append(
            (
                "contamination",
                f"{hit['item']}: {hit['length']} tokens in common, {hit['share']:.0%} of the "
                f"shorter sequence: {hit['matched']!r}",
            )
        )
