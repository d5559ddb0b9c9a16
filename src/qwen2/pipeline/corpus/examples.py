"""Documents to look at: some of each reason, the largest clusters, evidence, the quarantine.

Read for the report page, from a few parts; the texts are cut short.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qwen2.corpus.near_duplicates import CLUSTERS
from qwen2.pipeline.corpus.fates import CONTAMINATED, DUPLICATE, PARAGRAPHS
from qwen2.pipeline.corpus.judge import read_table
from qwen2.pipeline.corpus.layout import DOCUMENTS, QUARANTINE, Layout

EACH = 3  # examples of one reason
CLUSTERS_SHOWN, MEMBERS_SHOWN, HITS_SHOWN = 8, 4, 12
EXCERPT = 280

Rows = list[dict[str, Any]]


def excerpt(text: str, limit: int = EXCERPT) -> str:
    """The beginning of a text, in one piece of at most `limit` characters."""
    return text if len(text) <= limit else text[:limit].rstrip() + " …"


def dropped_examples(layout: Layout) -> dict[str, Rows]:
    """Reason -> a few documents that it drops: id, excerpt, evidence. First those that no other
    reason would drop."""
    found: dict[str, Rows] = {}
    for part in layout.parts:
        decided = read_table(layout.file("decisions", part)).to_pylist()
        wanted: list[tuple[str, int, str]] = []
        for alone in (True, False):
            for row, of in enumerate(decided):
                if (len(of["reasons"]) == 1) != alone:
                    continue
                for reason, evidence in zip(of["reasons"], of["evidence"], strict=True):
                    taken = sum(reason == name for name, _, _ in wanted)
                    if len(found.get(reason, ())) + taken < EACH:
                        wanted.append((reason, row, evidence))
        for (reason, _, evidence), shown in zip(
            wanted, _texts(layout, part, [row for _, row, _ in wanted]), strict=True
        ):
            found.setdefault(reason, []).append(shown | {"evidence": evidence})
    return found


def kept_and_lost(layout: Layout, seed: int = 0) -> dict[str, Rows]:
    """Fate -> a few documents, drawn from parts all over the corpus."""
    found: dict[str, Rows] = {}
    parts = list(layout.parts)
    rng = np.random.default_rng(seed)
    for number in rng.permutation(len(parts))[: 4 * EACH].tolist():
        fates = read_table(layout.file("fates", parts[number]), ["fate"])["fate"]
        for fate in ("train", DUPLICATE, CONTAMINATED, PARAGRAPHS):
            rows = np.flatnonzero(pc.equal(fates, fate).to_numpy())
            if len(rows) and len(found.get(fate, ())) < EACH:
                row = int(rng.choice(rows))
                found.setdefault(fate, []).extend(_texts(layout, parts[number], [row]))
    return found


def largest_clusters(layout: Layout) -> Rows:
    """The clusters with most members: cluster, size, members with similarity and excerpt."""
    table = pq.read_table(layout.place("duplicates") / CLUSTERS)
    sizes = table.group_by("cluster").aggregate([("id", "count")])
    largest = sizes.sort_by([("id_count", "descending"), ("cluster", "ascending")])
    shown = []
    for row in largest.slice(0, CLUSTERS_SHOWN).to_pylist():
        of = table.filter(pc.equal(table["cluster"], row["cluster"]))
        members = of.slice(0, MEMBERS_SHOWN).to_pylist()
        texts = _by_id(layout, [m["id"] for m in members if not m["older"]])
        for member in members:
            member["text"] = texts.get(member["id"], "")
        shown.append({"cluster": row["cluster"], "size": row["id_count"], "members": members})
    return shown


def contamination(layout: Layout) -> Rows:
    """The first hits of the decontamination, and the text that they stand in."""
    shown: Rows = []
    for part in layout.parts if layout.has("contamination") else ():
        for hit in read_table(layout.file("contamination", part)).to_pylist():
            if len(shown) == HITS_SHOWN:
                return shown
            text = _full_text(layout, part, hit["id"])
            start, end = hit["document_span"]
            shown.append(
                hit
                | {
                    "before": text[max(0, start - 120) : start],
                    "inside": excerpt(text[start:end], 600),
                    "after": text[end : end + 120],
                    "asked": excerpt(hit["asked"], 600),
                }
            )
    return shown


def quarantined(layout: Layout) -> Rows:
    """A few things that could not be read, of each reason."""
    found: dict[str, Rows] = {}
    for part in layout.parts:
        for row in pq.read_table(layout.part(part) / QUARANTINE).to_pylist():
            of = found.setdefault(row["reason"], [])
            if len(of) < EACH:
                of.append(row)
    return [row for of in found.values() for row in of]


def _texts(layout: Layout, part: str, rows: list[int]) -> Rows:
    """id, language and excerpt of rows of a part, in the order given."""
    if not rows:
        return []
    path = layout.part(part) / DOCUMENTS
    table = pq.read_table(path, columns=["id", "language", "text"]).take(pa.array(rows))
    return [row | {"text": excerpt(row["text"])} for row in table.to_pylist()]


def _by_id(layout: Layout, names: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for part, rows in _places(layout, names):
        found |= {row["id"]: row["text"] for row in _texts(layout, part, rows)}
    return found


def _places(layout: Layout, names: list[str]) -> Iterator[tuple[str, list[int]]]:
    """The parts and rows of some documents."""
    left = len(set(names))
    for part in layout.parts:
        if not left:
            return
        ids = read_table(layout.file("fates", part), ["id"])["id"]
        rows = np.flatnonzero(pc.is_in(ids, pa.array(names, pa.string())).to_numpy()).tolist()
        if rows:
            left -= len(rows)
            yield part, rows


def _full_text(layout: Layout, part: str, name: str) -> str:
    table = pq.read_table(layout.part(part) / DOCUMENTS, columns=["id", "text"])
    return str(table.filter(pc.equal(table["id"], name))["text"][0].as_py())
