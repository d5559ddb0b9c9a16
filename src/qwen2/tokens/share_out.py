"""Documents shared out among parts of a run that cut them into rows of different lengths.

A place in the data is a row of one context (loader.py): where the context changes, the place says
nothing, and beginning again would read the same documents again. So each part has documents of its
own, as many as its share of all the tokens that are trained on. A run of less than an epoch then
reads no document in two parts, and a longer one reads all about equally often.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qwen2.tokens.loader import TokenSource
from qwen2.tokens.weighted import Subset


def share_out(source: TokenSource, shares: Sequence[float], seed: int) -> list[TokenSource]:
    """Disjoint parts of `source`, drawn by `seed`, with these shares of its tokens.

    A share is met but for less than a document at each end. Where a part would have none of the
    documents, because they are so few, every part is all of them.
    """
    if len(shares) == 1 or not sum(shares):
        return [source] * len(shares)
    # The raw stream, as in packing.py: the same in every version of numpy.
    keys = np.random.PCG64([seed, 0, 1]).random_raw(len(source.lengths))
    order = np.argsort(keys, kind="stable")
    ends = np.cumsum(source.lengths[order])
    cuts = np.cumsum(shares) / sum(shares) * ends[-1]
    inner = np.searchsorted(ends, cuts[:-1], side="right")
    groups = np.split(order, inner)
    if any(share and not len(group) for share, group in zip(shares, groups, strict=True)):
        return [source] * len(shares)
    of = ":".join(f"{share:g}" for share in shares)
    return [
        Subset(source, np.sort(group), f"part {number} of {of}, seed {seed}")
        for number, group in enumerate(groups, start=1)
    ]
