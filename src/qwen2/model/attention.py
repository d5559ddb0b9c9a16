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

from qwen2.model.config import ModelConfig
from qwen2.model.linear import Linear, Projections
from qwen2.model.rope import Rope, Rotary, rotate


class AttentionContext(Protocol):
    """What one forward pass knows of batching, documents, caches and chunks."""

    def rotary(self, rope: Rope, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """Tables of this pass, computed once and handed to every layer's `attend`."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """q (N, H, D), k and v (N, K, D), not yet rotated -> (N, H, D)."""


class PackedAttention:
    """Documents laid end to end: causal within each, blind to the others.

    Each document is one call, so neither a mask nor padding is ever built: the memory is linear in
    N and no product is spent on pairs that may not see each other.
    """

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def rotary(self, rope: Rope, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """One table for queries and keys."""
        return rope.tables(positions, dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """Causal attention within each document."""
        q, k = rotate(q, rotary), rotate(k, rotary)
        documents = zip(*(x.split(self.lengths) for x in (q, k, v)), strict=True)
        return torch.cat([causal_attention(*document) for document in documents])


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of the last T of S tokens: q (T, H, D), k and v (S, K, D) -> (T, H, D).

    Query t sees keys up to S - T + t. Groups of query heads share a kv head by a stride of zero,
    never by a copy. fp16 is computed in fp32: |q·k| of these models overflows it.
    """
    T, H, D = q.shape
    S, K, _ = k.shape
    dtype = q.dtype
    if dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
    keys = k.transpose(0, 1)[:, None]  # (K, 1, S, D)
    values = v.transpose(0, 1)[:, None]
    if T == 1:  # one query sees everything: its groups are the rows of one product
        out = F.scaled_dot_product_attention(q.view(K, 1, H // K, D), keys, values)
        return out.reshape(1, H, D).to(dtype)
    out = F.scaled_dot_product_attention(
        q.view(T, K, H // K, D).permute(1, 2, 0, 3),  # (K, G, T, D)
        keys.expand(-1, H // K, -1, -1),
        values.expand(-1, H // K, -1, -1),
        attn_mask=None if S == T else _visible(T, S, q.device),
        is_causal=S == T,
    )
    return out.permute(2, 0, 1, 3).reshape(T, H, D).to(dtype)


def _visible(T: int, S: int, device: torch.device) -> Tensor:
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


class SelfAttention(nn.Module):
    """Projections around the attention context; bias on q, k and v only."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        C, KD = config.hidden_size, config.kv_size
        self.layer, self.head_dim = layer, config.head_dim
        self.q_proj = Linear(C, C)
        self.k_proj = Linear(C, KD)
        self.v_proj = Linear(C, KD)
        self.o_proj = Linear(C, C, bias=False)
        self.projections = Projections(self.q_proj, self.k_proj, self.v_proj)

    def forward(self, x: Tensor, rotary: Rotary, attention: AttentionContext) -> Tensor:
        """x (N, C) -> (N, C)."""
        q, k, v = (
            projected.unflatten(-1, (-1, self.head_dim))  # (N, H or K, D)
            for projected in self.projections(x)
        )
        return self.o_proj(attention.attend(self.layer, q, k, v, rotary).flatten(1))
