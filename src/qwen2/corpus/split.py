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

from qwen2.corpus.dedup import text_digest
from qwen2.corpus.documents import Document

OF_TEXT = re.compile(r"text:[0-9a-f]{32}")


def split_key(document: Document) -> str:
    """What decides the side of `document`."""
    if document.group is None:
        return f"text:{text_digest(document.text).hex()}"
    # A group that is the key of a text is that of whatever was made from it.
    return document.group if OF_TEXT.fullmatch(document.group) else f"group:{document.group}"


def group_of_derived(parent: Document) -> str:
    """The group of a document that was made from `parent`: a split never parts the two."""
    return parent.group if parent.group is not None else split_key(parent)


def held_out_keys(
    documents: Iterable[tuple[str, str, int]], fraction: float, seed: int = 0
) -> frozenset[str]:
    """The split keys to hold out: about `fraction` of all, and of each kind that has two keys at
    least one and at least half of `fraction` of its bytes.

    Args:
        documents: (kind, split key, bytes) of every document.
        fraction: 0 < fraction < 1.
    """
    assert 0 < fraction < 1, f"held-out fraction {fraction}: between 0 and 1"
    sizes: dict[str, Counter[str]] = {}
    for kind, key, size in documents:
        sizes.setdefault(kind, Counter())[key] += size
    chance = {key: _uniform(key, seed) for of_kind in sizes.values() for key in of_kind}
    held = {key for key, value in chance.items() if value < fraction}
    for _, of_kind in sorted(sizes.items()):
        enough = max(1, of_kind.total() * fraction / 2)
        done = sum(size for key, size in of_kind.items() if key in held)
        by_chance = sorted(of_kind.keys() - held, key=lambda key: (chance[key], key))
        for key in by_chance[:-1]:
            if done >= enough:
                break
            held.add(key)
            done += of_kind[key]
    return frozenset(held)


def _uniform(key: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
