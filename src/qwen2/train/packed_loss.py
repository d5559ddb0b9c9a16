"""The loss of a packed batch as a module, so that a model with its loss is one thing to shard.

The loss multiplies with the head's weight itself (loss.py), outside of the head's forward pass;
whoever gathers weights when a module runs, as FSDP does, can gather that one when this runs.

Where ranks share the tokens of their rows, each computes its part of them and of the loss; the parts
of all ranks add up to the loss of all rows, and so do their gradients.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from qwen2.model.attention import AttentionContext
from qwen2.model.decoder import Qwen2
from qwen2.model.moe import Routing
from qwen2.tokens.packing import PackedBatch
from qwen2.train.loss import chunked_cross_entropy
from qwen2.train.ulysses import Ulysses


class PackedLoss(nn.Module):
    """`model` up to its cross-entropy.

    context: the ranks that share the tokens of their rows; None: this one has them all.
    """

    def __init__(self, model: Qwen2, context: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.model, self.context = model, context

    def forward(
        self, batch: PackedBatch, count: int | None = None, routing: Routing | None = None
    ) -> Tensor:
        """Cross-entropy of a batch, summed and divided by `count` (None: their mean).

        All ranks that share tokens are given the same batch, of N tokens, which `cp` divides. What
        a mixture's routers did is added to `routing`.
        """
        model, device = self.model, self.model.device
        tokens, targets = batch.tokens, batch.targets
        attention: AttentionContext = model.packed(batch.lengths)
        if self.context is not None:
            assert count is not None  # of the targets of all ranks
            rank, size = self.context.rank(), self.context.size()
            tokens, targets = (x.chunk(size)[rank] for x in (tokens, targets))
            attention = Ulysses(attention, self.context)
        hidden = model.model(tokens.to(device), batch.positions.to(device), attention, routing)
        return chunked_cross_entropy(hidden, model.lm_head.weight, targets.to(device), count)
