"""The cache of keys and values, and the attention context that reads it.

All sequences share one pool of slots, a slot for each token (paged attention, Kwon et al. 2023).
Which slots a sequence has is its table; who gives them out is not known here (see
inference/blocks.py). A token's keys and values are read back by one flat `index_select` a layer,
or, where a table is one run of slots, as a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qwen2.model import kernels
from qwen2.model.attention import CAUSAL, Scheme
from qwen2.model.config import ModelConfig
from qwen2.model.packing import quantise_rows
from qwen2.model.rope import Rope, Rotary, Table, rotate


class LayerKV(NamedTuple):
    """One layer's keys (rotated) and values (slots, K, D), and what makes numbers of int8 ones.

    key_scale and value_scale (slots, K); bias (K, D), which the keys in the store lack, and the
    angles, cos and sin (positions, 1, D/2), by which it is rotated when a key is read.
    """

    keys: Tensor
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    bias: Tensor | None = None
    angles: Table | None = None

    def read(self, place: Tensor | slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values (S, K, D) of a sequence with slots (S,), or a run of them."""

        def taken(x: Tensor) -> Tensor:
            return x[place] if isinstance(place, slice) else x.index_select(0, place)

        keys, values = taken(self.keys), taken(self.values)
        if self.key_scale is None or self.value_scale is None:
            return keys, values
        assert self.bias is not None
        assert self.angles is not None
        cos, sin = (x[: len(keys)] for x in self.angles)
        keys = keys * taken(self.key_scale)[..., None]
        keys += rotate(self.bias.expand_as(keys), (cos, sin))
        return keys.to(dtype), (values * taken(self.value_scale)[..., None]).to(dtype)


class KVStore:
    """Keys (rotated) and values of all sequences: a tensor (slots, K, D) for each layer.

    One tensor a layer, because a stacked one that changes in place makes a compiled step slow. On
    the CPU a slot costs memory only from its first use on.

    With `key_bias`, the bias (K, D) of each layer's key projection, both are kept in int8, with a
    scale for each token and head. The bias of these models is so large, up to 393 in norm, that it
    would take all of the 8 bits: so it is taken off before, and added again when a key is read.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
        key_bias: Sequence[Tensor] | None = None,
    ) -> None:
        shape = (slots, config.num_key_value_heads, config.head_dim)

        def each(shape: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
            layers = range(config.num_hidden_layers)
            return [torch.empty(tuple(shape), dtype=dtype, device=device) for _ in layers]

        self.slots = slots
        self.key_bias = None
        if key_bias is not None:
            dtype = torch.int8
            self.key_scales, self.value_scales = (each(shape[:2], torch.float32) for _ in "kv")
            self.key_bias = [b.detach().float().view(shape[1:]).contiguous() for b in key_bias]
        self.keys, self.values = each(shape, dtype), each(shape, dtype)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v (N, K, D) into `slots` (N,); k without the bias, where that is kept apart."""
        if self.key_bias is not None:
            k, key_scale = quantise_rows(k)
            v, value_scale = quantise_rows(v)
            self.key_scales[layer].index_copy_(0, slots, key_scale)
            self.value_scales[layer].index_copy_(0, slots, value_scale)
        self.keys[layer].index_copy_(0, slots, k)
        self.values[layer].index_copy_(0, slots, v)

    def layer(self, layer: int, angles: Table | None = None) -> LayerKV:
        """What is in the store for a layer; int8 keys want the `angles` of all positions."""
        keys, values = self.keys[layer], self.values[layer]
        if self.key_bias is None:
            return LayerKV(keys, values)
        scales = self.key_scales[layer], self.value_scales[layer]
        return LayerKV(keys, values, *scales, self.key_bias[layer], angles)


class PagedAttention:
    """New tokens of several sequences, laid end to end, each seeing its own sequence up to itself.

    tables[i] (S_i,): the slots of all tokens of sequence i, the counts[i] new ones last. All new
    tokens of a layer are written before any is read, so a sequence may have slots in its table
    that another one fills in the same pass.
    """

    def __init__(
        self,
        store: KVStore,
        tables: Sequence[Tensor],
        counts: Sequence[int],
        scheme: Scheme = CAUSAL,
    ) -> None:
        self.store, self.tables, self.counts = store, list(tables), list(counts)
        self.scheme = scheme
        device = store.keys[0].device
        new = [table[-count:] for table, count in zip(self.tables, self.counts, strict=True)]
        self._new = (new[0] if len(new) == 1 else torch.cat(new)).to(device)  # (N,)
        self._places = [_place(table, device) for table in self.tables]
        self._angles: Table | None = None

    def positions(self, device: torch.device) -> Tensor:
        """Positions (N,) of the new tokens in their sequences."""
        return torch.cat(
            [
                torch.arange(len(table) - count, len(table), device=device)
                for table, count in zip(self.tables, self.counts, strict=True)
            ]
        )

    def last_rows(self, device: torch.device) -> Tensor:
        """The row (B,) of every sequence's last new token."""
        return torch.tensor(self.counts, device=device).cumsum(0) - 1

    def rotary(self, rope: Rope, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """The scheme's tables."""
        longest = max(map(len, self.tables))
        if self.store.key_bias is not None:
            every = torch.arange(longest, device=positions.device)
            self._angles = self.scheme.rotary(rope, every, longest, torch.float32)[0]
        return self.scheme.rotary(rope, positions, longest, dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """Store k and v (N, K, D) after rotation; q (N, H, D) sees its sequence up to itself."""
        if self.store.key_bias is not None:
            k = k - self.store.key_bias[layer].to(k.dtype)
        queries, k = self.scheme.rotate(q, k, rotary)
        self.store.write(layer, self._new, k, v)
        kept = self.store.layer(layer, self._angles)
        plain = self.scheme.is_plain(layer)
        out, first = [], 0
        for place, count in zip(self._places, self.counts, strict=True):
            new = slice(first, first + count)
            if plain:
                out.append(kernels.TABLE["attention"](queries[0][new], kept, place))
            else:
                rotated = [q[new] for q in queries]
                out.append(self.scheme.attend(layer, rotated, *kept.read(place, q.dtype)))
            first += count
        return out[0] if len(out) == 1 else torch.cat(out)


def _place(table: Tensor, device: torch.device) -> Tensor | slice:
    """A table on `device`; as a slice, when its slots follow each other."""
    first = int(table[0])
    if int(table[-1]) - first == len(table) - 1 and bool((table.diff() == 1).all()):
        return slice(first, first + len(table))
    return table.to(device)
