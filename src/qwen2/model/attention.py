"""Grouped-query attention and the attention contexts (report section 2.2.1).

The decoder sees tokens flat, as (N, ...). Who may look at whom is known only to the attention
context that is passed along: packed documents here, cached sequences in cache.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2.model import kernels
from qwen2.model.attend import Documents, Part, attend
from qwen2.model.config import ModelConfig
from qwen2.model.dual_chunk import DualChunkAttention
from qwen2.model.linear import Projections
from qwen2.model.quantised_linear import linear_layer
from qwen2.model.rope import Rope, Rotary, rotate

WINDOW_ROWS = 512  # queries of a sliding window that share a mask


class AttentionContext(Protocol):
    """What one forward pass knows of batching, documents, caches and chunks."""

    def rotary(self, rope: Rope, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """Tables of this pass, computed once and handed to every layer's `attend`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """q (N, H, D), k and v (N, K, D), not yet rotated -> (N, H, D)."""


class Scheme(Protocol):
    """How the tokens of one sequence see each other: a context applies it to each of its own."""

    def rotary(self, rope: Rope, positions: Tensor, longest: int, dtype: torch.dtype) -> Rotary:
        """Tables for `positions` (N,) in sequences of at most `longest` tokens."""

    def rotate(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Sequence[Tensor], Tensor]:
        """Queries in each of their rotations, and keys as they go into the cache."""

    def attend(self, layer: int, queries: Sequence[Tensor], k: Tensor, v: Tensor) -> Tensor:
        """The last T of S tokens: queries (T, H, D) each, k and v (S, K, D) -> (T, H, D)."""

    def is_plain(self, layer: int) -> bool:
        """Whether every token sees all before it, through one rotation."""


class CausalScheme:
    """Every token sees all before it and itself, or in some layers only a window of them.

    `windows[layer]` is the window's size, for layers that have one.
    """

    def __init__(self, windows: Sequence[int | None] = ()) -> None:
        self.windows = windows

    def rotary(self, rope: Rope, positions: Tensor, longest: int, dtype: torch.dtype) -> Rotary:
        """One table for queries and keys."""
        table = rope.table(positions, dtype)
        return table, table

    def rotate(self, q: Tensor, k: Tensor, rotary: Rotary) -> tuple[Sequence[Tensor], Tensor]:
        """One rotation of q (N, H, D) and k (N, K, D)."""
        keys, queries = rotary
        return [rotate(q, queries)], rotate(k, keys)

    def attend(self, layer: int, queries: Sequence[Tensor], k: Tensor, v: Tensor) -> Tensor:
        """The last T of S tokens: (T, H, D)."""
        window = self.windows[layer] if self.windows else None
        if window is None or window >= len(k):
            return causal_attention(queries[0], k, v)
        return windowed_attention(queries[0], k, v, window)

    def is_plain(self, layer: int) -> bool:
        """Without a window."""
        return not self.windows or self.windows[layer] is None


CAUSAL = CausalScheme()


def scheme_of(config: ModelConfig) -> Scheme:
    """The one place where a configuration chooses how its tokens see each other."""
    if config.dual_chunk:
        return DualChunkAttention(config.dual_chunk)
    if config.sliding:
        return CausalScheme([config.window(layer) for layer in range(config.num_hidden_layers)])
    return CAUSAL


class PackedAttention:
    """Documents laid end to end: causal within each, blind to the others.

    Neither a mask nor padding is ever built: the memory is linear in N and no product is spent on
    pairs that may not see each other.
    """

    def __init__(self, lengths: Sequence[int], scheme: Scheme = CAUSAL) -> None:
        self.lengths, self.scheme = list(lengths), scheme
        self.documents = Documents(self.lengths)

    def rotary(self, rope: Rope, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """The scheme's tables."""
        return self.scheme.rotary(rope, positions, max(self.lengths, default=0), dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """Attention within each document."""
        queries, k = self.scheme.rotate(q, k, rotary)
        if self.scheme.is_plain(layer):
            attended: Tensor = kernels.TABLE["packed attention"](queries[0], k, v, self.documents)
            return attended
        documents = zip(*(x.split(self.lengths) for x in (k, v, *queries)), strict=True)
        return torch.cat([self.scheme.attend(layer, rotated, k, v) for k, v, *rotated in documents])


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last T of S tokens: q (T, H, D), k and v (S, K, D) -> (T, H, D).

    Query t sees keys up to S - T + t.
    """
    first = len(k) - len(q)
    if first == 0 or len(q) == 1:
        return attend([Part(q, k, v, causal=len(q) > 1)])
    before = Part(q, k[:first], v[:first], causal=False)
    return attend([before, Part(q, k[first:], v[first:], causal=True)])


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """As `causal_attention`, but a query sees at most `window` keys, its own token's included.

    Blocks of queries meet only the keys that they may see, under a mask as wide as those.
    """
    T, H, D = q.shape
    K, dtype = k.shape[1], q.dtype
    if dtype == torch.float16:  # see attend
        q, k, v = q.float(), k.float(), v.float()
    first = len(k) - T
    out = []
    for start in range(0, T, WINDOW_ROWS):
        rows = q[start : start + WINDOW_ROWS]
        stop = first + start + len(rows)
        begin = max(0, first + start - window + 1)
        distance = torch.arange(first + start, stop)[:, None] - torch.arange(begin, stop)
        seen = ((distance >= 0) & (distance < window)).to(q.device)
        keys, values = (x[begin:stop].transpose(0, 1)[:, None] for x in (k, v))
        block = F.scaled_dot_product_attention(
            rows.view(-1, K, H // K, D).permute(1, 2, 0, 3),  # (K, G, T, D)
            keys.expand(-1, H // K, -1, -1),
            values.expand(-1, H // K, -1, -1),
            attn_mask=seen,
        )
        out.append(block.permute(2, 0, 1, 3).reshape(-1, H, D))
    return torch.cat(out).to(dtype)


class SelfAttention(nn.Module):
    """Projections around the attention context; bias on q, k and v only."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, KD, bits = config.hidden_size, config.kv_size, config.quantisation
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = linear_layer(C, C, True, bits)
        self.k_proj = linear_layer(C, KD, True, bits)
        self.v_proj = linear_layer(C, KD, True, bits)
        self.o_proj = linear_layer(C, C, False, bits)
        self.projections = Projections(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x: Tensor, rotary: Rotary, attention: AttentionContext) -> Tensor:
        """x (N, C) -> (N, C)."""
        q, k, v = (
            projected.unflatten(-1, (-1, self.head_dim))  # (N, H or K, D)
            for projected in self.projections(x)
        )
        return self.o_proj(attention.attend(self.layer, q, k, v, rotary).flatten(1))
