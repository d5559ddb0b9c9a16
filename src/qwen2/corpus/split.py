"""Train and held-out documents, chosen by a hash: whatever the order, whatever else is there.

The hash is of the document's group if it has one, else of its text. A module's code and the
docstrings taken from it share a group and so a side, else the held-out set would leak. Only a kind
that chance leaves without a held-out document depends on the rest of the corpus: the group with
the smallest hash is held out for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from qwen2.corpus.dedup import text_digest
from qwen2.corpus.documents import Document


def split_key(document: Document) -> str:
    """What decides the side of `document`."""
    if document.group is not None:
        return f"group:{document.group}"
    return f"text:{text_digest(document.text).hex()}"


def held_out_keys(
    documents: Iterable[tuple[str, str]], fraction: float, seed: int = 0
) -> frozenset[str]:
    """The split keys to hold out: about `fraction` of the keys, one at least of every kind.

    Args:
        documents: (kind, split key) of every document. A kind with a single document has none held
            out for its own sake.
        fraction: 0 < fraction < 1.
    """
    assert 0 < fraction < 1, f"held-out fraction {fraction}: between 0 and 1"
    keys: dict[str, list[str]] = {}
    for kind, key in documents:
        keys.setdefault(kind, []).append(key)
    chance = {key: _uniform(key, seed) for of_kind in keys.values() for key in of_kind}
    held = {key for key, value in chance.items() if value < fraction}
    for kind in sorted(keys):
        if len(keys[kind]) >= 2 and held.isdisjoint(keys[kind]):
            held.add(min(keys[kind], key=lambda key: (chance[key], key)))
    return frozenset(held)


def _uniform(key: str, seed: int) -> float:
    digest = hashlib.blake2b(f"{seed}:{key}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64
