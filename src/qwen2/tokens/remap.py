"""Fewer tokens: token ids of a large vocabulary as those of a small one, without losing a byte.

A proxy model of half a million parameters cannot bear an embedding of 152k rows, and most of its
time would go into the logits (7.5k tokens/s at 8k tokens, 0.8k at 152k). The small vocabulary is
`<|endoftext|>`, the 256 single bytes and the most used tokens. A token that is left out is written
in those that stay: from its beginning the longest that fits, again and again, single bytes if need
be. So the bytes of a document stay what they were, and bits per byte of proxies are as honest as
those of the full vocabulary, and comparable with them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2.common.errors import UserError

END_OF_TEXT = 0
FIRST_BYTE = 1
LEAST_SIZE = 257


@dataclass(frozen=True)
class Remapping:
    """What each id of a vocabulary of V tokens becomes: ids[starts[i]:starts[i + 1]]."""

    vocabulary: list[bytes]
    """(size,) the bytes of the new tokens; none of `<|endoftext|>`."""
    starts: NDArray[np.int64]
    """(V + 1,)"""
    ids: NDArray[np.int64]
    byte_lengths: NDArray[np.int64]
    """(V,) bytes of each old token."""

    def apply(self, tokens: NDArray[Any]) -> NDArray[np.int64]:
        """(n,) old ids -> (m,) new ids of the same bytes, m >= n."""
        starts, lengths = self.starts[tokens], np.diff(self.starts)[tokens]
        ends = np.cumsum(lengths)
        offsets = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - lengths, lengths)
        return self.ids[np.repeat(starts, lengths) + offsets]

    def decode(self, ids: NDArray[Any]) -> bytes:
        """The bytes of new ids."""
        return b"".join(self.vocabulary[id_] for id_ in ids.tolist())


def most_used(
    ranks: Mapping[bytes, int], end_of_text: int, use: NDArray[np.float64], size: int
) -> Remapping:
    """The remapping onto the `size` most used tokens.

    Args:
        ranks: the regular tokens and their ids, all single bytes among them.
        use: (V,) how often each id is used; all ids but `end_of_text` with any use are regular.

    Raises:
        UserError: `size` has no room for the single bytes, or control tokens are used.
    """
    if size < LEAST_SIZE:
        raise UserError(f"vocabulary {size}: at least {LEAST_SIZE}, for every byte")
    kept = [bytes([value]) for value in range(256)]
    by_id = {id_: token for token, id_ in ranks.items()}
    for id_ in np.argsort(-use, kind="stable"):
        if len(kept) == size - 1 or not use[id_]:
            break
        token = by_id.get(int(id_))
        if token is None and id_ != end_of_text:
            raise UserError(f"token {id_} is a control token inside a text; make the shards again")
        if token is not None and len(token) > 1:
            kept.append(token)
    new = {token: FIRST_BYTE + place for place, token in enumerate(kept)}
    longest = max(map(len, kept))
    pieces = [_longest_first(by_id.get(id_, b""), new, longest) for id_ in range(len(use))]
    pieces[end_of_text] = [END_OF_TEXT]
    return Remapping(
        [b"", *kept],
        np.cumsum([0, *map(len, pieces)]),
        np.array([id_ for piece in pieces for id_ in piece], np.int64),
        np.array([len(by_id.get(id_, b"")) for id_ in range(len(use))], np.int64),
    )


def _longest_first(token: bytes, new: Mapping[bytes, int], longest: int) -> list[int]:
    ids, start = [], 0
    while start < len(token):
        stop = min(len(token), start + longest)
        while token[start:stop] not in new:
            stop -= 1
        ids.append(new[token[start:stop]])
        start = stop
    return ids
