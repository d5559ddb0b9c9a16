"""The cache of keys and values, and the attention context that reads it.

All sequences share one pool of slots, a slot for each token (paged attention, Kwon et al. 2023).
Which slots a sequence has is its table; who gives them out is not known here (see
inference/blocks.py). A token's keys and values are read back by one flat `index_select` a layer,
or, where a table is one run of slots, as a view.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qwen2.model import kernels, native
from qwen2.model.attention import CAUSAL, Scheme
from qwen2.model.config import ModelConfig
from qwen2.model.rope import Rope, Rotary


class KVStore:
    """Keys (rotated) and values of all sequences: a tensor (slots, K, D) for each layer.

    One tensor a layer, because a stacked one that changes in place makes a compiled step slow. On
    the CPU a slot costs memory only from its first use on.
    """

    def __init__(
        self, config: ModelConfig, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (slots, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.slots = slots
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in layers]

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Put k and v (N, K, D) into `slots` (N,)."""
        self.keys[layer].index_copy_(0, slots, k)
        self.values[layer].index_copy_(0, slots, v)

    def read(self, layer: int, table: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Keys and values (S, K, D) of a table (S,) of slots, or of a run of them."""
        keys, values = self.keys[layer], self.values[layer]
        if isinstance(table, slice):
            return keys[table], values[table]
        return keys.index_select(0, table), values.index_select(0, table)


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
        keys = store.keys[0]
        paged = native.can_attend(keys.shape[-1], keys.dtype, device)
        self._slots = [table.int() for table in self.tables] if paged else []

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
        return self.scheme.rotary(rope, positions, max(map(len, self.tables)), dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """Store k and v (N, K, D) after rotation; q (N, H, D) sees its sequence up to itself."""
        queries, k = self.scheme.rotate(q, k, rotary)
        self.store.write(layer, self._new, k, v)
        out, first = [], 0
        if self._slots and self.scheme.is_plain(layer):
            keys, values = self.store.keys[layer], self.store.values[layer]
            for slots, count in zip(self._slots, self.counts, strict=True):
                new = queries[0][first : first + count]
                out.append(kernels.TABLE["attention"](new, keys, values, slots))
                first += count
            return out[0] if len(out) == 1 else torch.cat(out)
        for place, count in zip(self._places, self.counts, strict=True):
            keys, values = self.store.read(layer, place)
            rotated = [q[first : first + count] for q in queries]
            out.append(self.scheme.attend(layer, rotated, keys, values))
            first += count
        return out[0] if len(out) == 1 else torch.cat(out)


def _place(table: Tensor, device: torch.device) -> Tensor | slice:
    """A table on `device`; as a slice, when its slots follow each other."""
    first = int(table[0])
    if int(table[-1]) - first == len(table) - 1 and bool((table.diff() == 1).all()):
        return slice(first, first + len(table))
    return table.to(device)
