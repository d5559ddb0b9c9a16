"""Dual Chunk Attention (An et al. 2024, arXiv 2402.17463; report section 2.2.1).

A sequence is cut into chunks of L = C - w tokens, and no relative position beyond C is ever used,
however long the sequence is. With i the query's position and j the key's, their distance counts as

    same chunk        i - j
    previous chunk    min(i mod L + L, C) - j mod L     exact for distances below w
    older chunks      min(2L - 1, C) - j mod L

so a key is rotated once, by j mod L, and cached so; a query is rotated up to three times. Each of
its three sets of keys is one part of `attend`, and no T x T matrix is built. For sequences up to
min(C + 1, 2L) tokens all distances are the true ones.

"DCA + YARN" as the report runs it leaves the frequencies alone: YARN gives only the temperature.
Here the query at position i carries m² on its logits, with m = 0.1·ln((i + 1) / L0) + 1 beyond L0
tokens and 1 within. Of the two conventions, old keys that keep the m they were written with, or
queries that carry the whole, the second is chosen: a token's result then depends only on what came
before it, so that prefill in any pieces, then decode, equals one full pass, and the cache holds the
same keys whatever follows. (Scaling q and k by m of the final length, as others do, makes the first
tokens of a long prompt depend on its end.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen2.model.attend import Part, attend
from qwen2.model.config import DualChunk
from qwen2.model.rope import Rope, Rotary, Table, rotate


@dataclass(frozen=True)
class DualChunkAttention:
    """The scheme (see attention.py) of a `DualChunk` configuration."""

    config: DualChunk

    def rotary(self, rope: Rope, positions: Tensor, longest: int, dtype: torch.dtype) -> Rotary:
        """Tables for keys, then for queries in the same, the previous and older chunks.

        Those that a sequence of `longest` tokens has no use for are left out.
        """
        C, L = self.config.chunk_size, self.config.stride
        inside = positions % L
        keys = rope.table(inside, dtype)
        queries = [keys]
        if longest > L:
            queries.append(rope.table((inside + L).clamp(max=C), dtype))
        if longest > 2 * L:
            queries.append(rope.table(torch.full_like(positions, min(2 * L - 1, C)), dtype))
        trained = self.config.original_max_position_embeddings
        if trained is not None and longest > trained:
            heat = squared_temperature(positions, trained, dtype)
            queries = [_scaled(table, heat) for table in queries]
        return (keys, *queries)

    def rotate(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[list[Tensor], Tensor]:
        """Up to three copies of q (N, H, D), and k (N, K, D) as it is cached."""
        keys, *queries = rotary
        return [rotate(q, table) for table in queries], rotate(k, keys)

    def attend(self, layer: int, queries: Sequence[Tensor], k: Tensor, v: Tensor) -> Tensor:
        """The last T of S tokens: queries (T, H, D) each, k and v (S, K, D) -> (T, H, D)."""
        T, S, L = len(queries[0]), len(k), self.config.stride
        first = S - T
        out = []
        for begin in range(first // L * L, S, L):  # chunks that queries lie in
            start, stop = max(begin, first), min(begin + L, S)
            rows = slice(start - first, stop - first)
            parts = []
            if begin > L:
                parts.append(Part(queries[2][rows], k[: begin - L], v[: begin - L], False))
            if begin:
                previous = slice(begin - L, begin)
                parts.append(Part(queries[1][rows], k[previous], v[previous], False))
            if start > begin:
                parts.append(Part(queries[0][rows], k[begin:start], v[begin:start], False))
            parts.append(Part(queries[0][rows], k[start:stop], v[start:stop], True))
            out.append(attend(parts))
        return out[0] if len(out) == 1 else torch.cat(out)

    def is_plain(self, layer: int) -> bool:
        """Never: a query has up to three rotations."""
        return False


def squared_temperature(positions: Tensor, trained: int, dtype: torch.dtype) -> Tensor:
    """m² for queries at `positions` (N,), in fp32 at least: (N,)."""
    seen = (positions + 1).to(torch.promote_types(dtype, torch.float32))
    return (0.1 * (seen / trained).clamp(min=1).log() + 1).square()


def _scaled(table: Table, factor: Tensor) -> Table:
    """A table (N, 1, D/2) whose rotations also multiply by `factor` (N,)."""
    by_token = factor[:, None, None]
    cos, sin = ((x.to(factor.dtype) * by_token).to(x.dtype) for x in table)
    return cos, sin
