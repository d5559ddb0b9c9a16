"""Exact deduplication: of documents with the same normalised text, the first stays.

Memory holds one 128-bit digest a document. Two different texts collide with probability about
n² / 2^129: 1e-15 for half a trillion documents.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator

from qwen2.corpus.documents import Document

DIGEST_BYTES = 16


def text_digest(text: str) -> bytes:
    """128 bits of the text in NFC with each run of white space as one space, trimmed."""
    normal = " ".join(unicodedata.normalize("NFC", text).split())
    return hashlib.blake2b(normal.encode(), digest_size=DIGEST_BYTES).digest()


def deduplicate(
    documents: Iterable[Document], removed: Counter[str], seen: set[bytes] | None = None
) -> Iterator[Document]:
    """The documents whose normalised text is new.

    Args:
        removed: counts the duplicates by kind.
        seen: digests of texts that count as known; grows. Pass one to compare with an older set.
    """
    seen = set() if seen is None else seen
    for document in documents:
        digest = text_digest(document.text)
        if digest in seen:
            removed[document.kind] += 1
        else:
            seen.add(digest)
            yield document
