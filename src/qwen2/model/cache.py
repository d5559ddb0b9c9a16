"""The cache of keys and values, and the attention context that reads it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2.model.attention import CAUSAL, Scheme
from qwen2.model.config import ModelConfig
from qwen2.model.rope import Rope, Rotary


class KVCache:
    """Keys (rotated) and values of one sequence: a tensor (capacity, K, D) for each layer.

    The capacity doubles as the sequence grows, so that nothing is reserved for a context that is
    never used.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        empty = torch.empty(
            (0, config.num_key_value_heads, config.head_dim), dtype=dtype, device=device
        )
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers
        self.capacity = self.length = 0

    def reserve(self, length: int) -> None:
        """Make room for `length` tokens."""
        if length <= self.capacity:
            return
        self.capacity = max(length, 2 * self.capacity, 64)
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                tensors[layer] = old.new_empty((self.capacity, *old.shape[1:]))
                tensors[layer][: self.length] = old[: self.length]

    def truncate(self, length: int) -> None:
        """Forget every token from `length` on."""
        assert 0 <= length <= self.length
        self.length = length


class CachedAttention:
    """New tokens of several sequences, laid end to end, each seeing its own cache.

    `counts[i]` new tokens belong to `caches[i]`; after the pass `advance` makes them part of it.
    """

    def __init__(
        self, caches: Sequence[KVCache], counts: Sequence[int], scheme: Scheme = CAUSAL
    ) -> None:
        for cache, count in zip(caches, counts, strict=True):
            cache.reserve(cache.length + count)
        self.caches, self.counts, self.scheme = list(caches), list(counts), scheme

    def positions(self, device: torch.device) -> Tensor:
        """Positions (N,) of the new tokens in their sequences."""
        return torch.cat(
            [
                torch.arange(cache.length, cache.length + count, device=device)
                for cache, count in zip(self.caches, self.counts, strict=True)
            ]
        )

    def last_rows(self, device: torch.device) -> Tensor:
        """The row (B,) of every sequence's last new token."""
        return torch.tensor(self.counts, device=device).cumsum(0) - 1

    def rotary(self, rope: Rope, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """The scheme's tables."""
        longest = max(c.length + n for c, n in zip(self.caches, self.counts, strict=True))
        return self.scheme.rotary(rope, positions, longest, dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """Store k and v (N, K, D) after rotation; q (N, H, D) sees its sequence up to itself."""
        queries, k = self.scheme.rotate(q, k, rotary)
        out, first = [], 0
        for cache, count in zip(self.caches, self.counts, strict=True):
            new = slice(first, first + count)
            end = cache.length + count
            keys, values = cache.keys[layer], cache.values[layer]
            keys[cache.length : end] = k[new]
            values[cache.length : end] = v[new]
            rotated = [q[new] for q in queries]
            out.append(self.scheme.attend(layer, rotated, keys[:end], values[:end]))
            first += count
        return out[0] if len(out) == 1 else torch.cat(out)

    def advance(self) -> None:
        """Count the new tokens as part of their caches."""
        for cache, count in zip(self.caches, self.counts, strict=True):
            cache.length += count
