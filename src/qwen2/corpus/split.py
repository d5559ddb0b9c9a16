"""Train and held-out documents, chosen by a hash: whatever the order, whatever else is there.

The hash is of the document's group if it has one, else of its text. A module's code and the
docstrings taken from it share a group and so a side, else the held-out set would leak; so do a text
and what a model made of it (`group_of_derived`). Only a kind of which chance holds out too few
bytes to measure depends on the rest of the corpus: the keys with its next smallest hashes are held
out too.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from qwen2.corpus.dedup import text_digest
from qwen2.corpus.documents import Document

OF_TEXT = re.compile(r"text:[0-9a-f]{32}")


def split_key(document: Document) -> str:
    """What decides the side of `document`."""
    return key_of(document.group, text_digest(document.text))


def group_of_derived(parent: Document) -> str:
    """The group of a document that was made from `parent`: a split never parts the two."""
    return parent.group if parent.group is not None else split_key(parent)


def key_of(group: str | None, digest: bytes) -> str:
    """`split_key` of a document of this group and digest of its text."""
    if group is None:
        return f"text:{digest.hex()}"
    # A group that is the key of a text is that of whatever was made from it.
    return group if OF_TEXT.fullmatch(group) else f"group:{group}"


@dataclass(frozen=True)
class HeldOut:
    """The split keys that are held out: `key in held_out`."""

    fraction: float
    seed: int
    also: frozenset[str] = frozenset()
    """Those beyond chance."""

    def __contains__(self, key: str) -> bool:
        return _uniform(key, self.seed) < self.fraction or key in self.also


def choose_held_out(
    documents: Iterable[tuple[str, str, int]], fraction: float, seed: int = 0
) -> HeldOut:
    """About `fraction` of all keys, and of each kind that has two keys at least one and at least
    half of `fraction` of its bytes, as far as its `CANDIDATES` next keys reach.

    Memory: nothing a document, so that it does for any corpus.

    Args:
        documents: (kind, split key, bytes) of every document.
        fraction: 0 < fraction < 1.
    """
    assert 0 < fraction < 1, f"held-out fraction {fraction}: between 0 and 1"
    totals: Counter[str] = Counter()
    held: Counter[str] = Counter()
    spared: dict[str, _Smallest] = {}
    for kind, key, size in documents:
        totals[kind] += size
        chance = _uniform(key, seed)
        if chance < fraction:
            held[kind] += size
        else:
            spared.setdefault(kind, _Smallest()).add((chance, key), size)
    also: set[str] = set()
    for kind in sorted(spared):
        sizes = spared[kind].sizes()
        enough = max(1, totals[kind] * fraction / 2)
        done = held[kind] + sum(size for (_, key), size in sizes.items() if key in also)
        left = sorted(item for item in sizes if item[1] not in also)
        for item in left[:-1]:  # one stays, and at least one trains
            if done >= enough:
                break
            also.add(item[1])
            done += sizes[item]
    return HeldOut(fraction, seed, frozenset(also))


CANDIDATES = 1000


class _Smallest:
    """The `CANDIDATES` smallest of all items, with the sum of the sizes of each."""

    def __init__(self) -> None:
        self._sizes: Counter[tuple[float, str]] = Counter()

    def add(self, item: tuple[float, str], size: int) -> None:
        self._sizes[item] += size
        if len(self._sizes) >= 4 * CANDIDATES:
            self._sizes = self.sizes()

    def sizes(self) -> Counter[tuple[float, str]]:
        # What is left out was larger than so many others, and stays so: no sum of one kept is cut.
        return Counter({item: self._sizes[item] for item in sorted(self._sizes)[:CANDIDATES]})


def _uniform(key: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
