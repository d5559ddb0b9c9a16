"""Context parallelism by heads (DeepSpeed-Ulysses, Jacobs et al. 2023).

Each of the `cp` ranks holds N/cp tokens of the batch, neighbours, for all that looks at one token
alone. For attention they exchange: every rank gets all N tokens of a share of the heads, attends as
one process does, and gives back what it computed of the others' tokens. Documents may cross from
rank to rank, and attention itself knows nothing of it.

Deviation: where there are fewer kv heads than ranks, each is sent to all ranks whose query heads
share it; the paper wants at least as many.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from qwen2.model.attention import AttentionContext
from qwen2.model.rope import Rope, Rotary


class Ulysses:
    """The attention context of n = N/cp tokens of the whole that `inner` knows.

    It is given positions, and so tables, of all N tokens.
    """

    def __init__(self, inner: AttentionContext, group: dist.ProcessGroup) -> None:
        self.inner, self.group = inner, group

    def rotary(self, rope: Rope, positions: Tensor, dtype: torch.dtype) -> Rotary:
        """The inner context's tables, for `positions` (N,)."""
        return self.inner.rotary(rope, positions, dtype)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rotary: Rotary) -> Tensor:
        """q (n, H, D), k and v (n, K, D), not yet rotated -> (n, H, D)."""
        cp = self.group.size()
        if (K := k.shape[1]) < cp:
            k, v = (x.repeat_interleave(cp // K, dim=1) for x in (k, v))
        heads = [x.unflatten(1, (cp, -1)) for x in (q, k, v)]  # (n, cp, H/cp or K/cp, D)
        sizes = [x.shape[2] for x in heads]
        joint = torch.cat(heads, dim=2).transpose(0, 1)  # (cp, n, heads, D), by receiver
        joint = self._exchange(joint).flatten(0, 1)  # (N, heads, D): by sender is in order
        q, k, v = joint.split(sizes, dim=1)
        out = self.inner.attend(layer, q, k, v, rotary)  # (N, H/cp, D)
        out = self._exchange(out.unflatten(0, (cp, -1)))  # (cp, n, H/cp, D), by sender
        return out.transpose(0, 1).flatten(1, 2)  # (n, H, D)

    def _exchange(self, parts: Tensor) -> Tensor:
        """parts (cp, ...) for each rank -> those that each rank has for this one."""
        return all_to_all_single_autograd(parts.contiguous(), None, None, self.group)
