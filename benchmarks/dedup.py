"""Near-duplicates beside datatrove and text-dedup: end to end, from texts to the ids that stay.

The text is what this machine has, with near-duplicates planted. Each side runs in one process on
one thread; ratios are our speed over the peer's (greater than 1: we are faster), pair by pair.
`planted`: how many pairs of a known Jaccard similarity share a band, beside 1 - (1 - s^8)^14.
`linear`: speed and peak memory as the text grows, by repeating it with every fifth word changed.

    python dedup.py --peers /path/to/a/python/with/datatrove,text-dedup,rensa
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import finish, options, ratios, spread
from peers.processes import Absent, Child, closing
from qwen2.corpus import Document, local_documents, read_documents, write_documents
from qwen2.corpus.minhash import MinHash
from qwen2.corpus.near_duplicates import dropped_rows, find_duplicates, without
from qwen2.corpus.readers import Limit
from qwen2.corpus.sketches import write_sketches

KINDS = ("code", "docstrings", "reference", "prose", "multilingual")
FAMILY = MinHash()


def main() -> None:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--peers", help="a Python that has datatrove, text-dedup, spacy and rensa")
    parser.add_argument("--megabytes", type=float, default=4, help="of text for the comparison")
    parser.add_argument("--grow", type=int, nargs="*", default=[10, 100], help="megabytes")
    parser.add_argument("--child", type=Path, help="deduplicate this file and print the figures")
    chosen = parser.parse_args()
    if chosen.child:
        print(json.dumps(ours(chosen.child) | {"peak_rss_bytes": peak_rss()}))
        return
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "documents.parquet"
        documents = list(texts(int(chosen.megabytes * 1e6)))
        write_documents(path, documents)
        figures = compare(path, documents, chosen.peers, chosen.rounds) if chosen.rounds else {}
        figures["planted"] = planted()
        figures["linear"] = [grown(Path(place), documents, size) for size in chosen.grow]
    finish("dedup", figures, chosen)


def texts(size: int) -> Iterator[Document]:
    """Real documents, and after every fourth a copy with 3 % of its words changed."""
    limit = Limit(megabytes=size / len(KINDS) / 1e6)
    found = (thing for kind in KINDS for thing in limit.within(local_documents(kind)))
    for i, document in enumerate(thing for thing in found if isinstance(thing, Document)):
        yield document
        if i % 4 == 0:
            yield changed(document, 0.03, i)


def changed(document: Document, share: float, seed: int) -> Document:
    """A copy with about that share of its words replaced by new ones."""
    r = random.Random(seed)
    words = [f"x{r.random()}" if r.random() < share else w for w in document.text.split(" ")]
    return Document(" ".join(words), f"{document.id}~{seed}", document.source, document.kind)


def ours(path: Path) -> dict[str, Any]:
    """Deduplicate a file: seconds, megabytes and the ids that stay. The texts are read twice."""
    with tempfile.TemporaryDirectory() as place:
        sketches, found = Path(place) / "sketches", Path(place) / "found"
        started = time.perf_counter()
        size = 0

        def counted() -> Iterator[Document]:
            nonlocal size
            for document in read_documents(path):
                size += document.size
                yield document

        write_sketches(sketches, counted(), FAMILY)
        sketched = time.perf_counter() - started
        find_duplicates(found, [sketches], FAMILY)
        kept = [d.id for d in without(read_documents(path), dropped_rows(found, 0))]
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "sketch_seconds": sketched, "bytes": size, "kept": kept}


def peak_rss() -> int:
    """Bytes, of this process since it started its program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def compare(
    path: Path, documents: list[Document], python: str | None, rounds: int
) -> dict[str, Any]:
    """Speeds in turn with each peer, and how far the decisions are the same."""
    ours(path)
    size = sum(d.size for d in documents) / 1e6
    figures: dict[str, Any] = {"documents": len(documents), "megabytes": round(size, 2)}
    names = {"datatrove": "minhash", "text-dedup": "minhash_text_dedup", "rensa": "minhash_rensa"}
    for peer, key in names.items():
        try:
            if not python:
                raise Absent("--peers is not given")
            child = Child(python, "dedup_child.py", peer)
        except Absent as why:
            figures[f"{key}_absent"] = str(why)
            continue
        mine, theirs = [], []
        with closing(child):
            for number in range(rounds + 1):
                us, them = ours(path), child.call("dedup", path=str(path))
                if number:
                    mine.append(size / (us["sketch_seconds" if peer == "rensa" else "seconds"]))
                    theirs.append(size / them["seconds"])
            figures[f"{key}_ratio"] = ratios(mine, theirs)
            figures[f"{key}_megabytes_per_second"] = {"ours": spread(mine), peer: spread(theirs)}
            figures[f"{key}_version"] = child.version
            if peer != "rensa":
                figures[f"{key}_decisions"] = agreement(documents, us["kept"], them["kept"])
    return figures


def agreement(documents: list[Document], ours: list[str], theirs: list[str]) -> dict[str, int]:
    """How many documents each side drops, and of how many clusters' worth both say the same.

    Which document of a cluster stays differs by design, so documents are compared by their origin.
    """
    origin = {d.id: d.id.split("~")[0] for d in documents}
    left = [Counter(origin[i] for i in ids) for ids in (ours, theirs)]
    return {
        "dropped_ours": len(documents) - len(ours),
        "dropped_theirs": len(documents) - len(theirs),
        "originals": len(set(origin.values())),
        "originals_with_as_many_left": sum(left[0][o] == left[1][o] for o in set(origin.values())),
    }


def planted(pairs: int = 2000) -> dict[str, Any]:
    """For known Jaccard similarities, the share of pairs that is found, beside the curve.

    300 words have 296 n-grams; a common beginning of c + 4 words keeps c of them.
    """
    r = random.Random(0)
    result: dict[str, Any] = {}
    for percent in (30, 50, 60, 70, 80, 85, 90, 95):
        common = round(296 * 2 * percent / (100 + percent))
        found = 0
        for _ in range(0, pairs, 100):
            left = [[f"w{r.randrange(10**6)}" for _ in range(300)] for _ in range(100)]
            right = [
                words[: common + 4] + [f"w{r.randrange(10**6)}" for _ in range(296 - common)]
                for words in left
            ]
            texts_of = ([" ".join(words) for words in side] for side in (left, right))
            ours, theirs = (FAMILY.band_keys(FAMILY.signatures(side)) for side in texts_of)
            found += int((ours == theirs).any(axis=1).sum())
        jaccard = common / (2 * 296 - common)
        result[str(percent / 100)] = {
            "jaccard": round(jaccard, 4),
            "found": found / pairs,
            "curve": round(FAMILY.probability(jaccard), 4),
        }
    return result


def grown(place: Path, documents: list[Document], megabytes: int) -> dict[str, Any]:
    """Speed and peak memory in a process of its own, on so much text."""
    path = place / "grown.parquet"
    write_documents(path, repeated(documents, megabytes * 1_000_000))
    command = [sys.executable, __file__, "--child", str(path)]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    figures = json.loads(line)
    path.unlink()
    return {
        "megabytes": round(figures["bytes"] / 1e6, 1),
        "megabytes_per_second": round(figures["bytes"] / 1e6 / figures["seconds"], 2),
        "peak_rss_megabytes": round(figures["peak_rss_bytes"] / 1e6),
        "kept": len(figures["kept"]),
    }


def repeated(documents: list[Document], size: int) -> Iterator[Document]:
    """The documents again and again, after the first time with a fifth of the words changed."""
    done = number = 0
    while True:
        for i, document in enumerate(documents):
            again = changed(document, 0.2, 10_000 * number + i) if number else document
            done += again.size
            if done > size:
                return
            yield again
        number += 1


if __name__ == "__main__":
    main()
