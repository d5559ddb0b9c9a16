"""The loss of a packed batch as a module, so that a model with its loss is one thing to shard.

The loss multiplies with the head's weight itself (loss.py), outside of the head's forward pass;
whoever gathers weights when a module runs, as FSDP does, can gather that one when this runs.

Where ranks share the tokens of their rows, each computes its part of them and of the loss; the
parts of all ranks add up to the loss of all rows, and so do their gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qwen2.model.attention import AttentionContext
from qwen2.model.decoder import Qwen2
from qwen2.model.moe import Routing
from qwen2.tokens.packing import PackedBatch
from qwen2.train.loss import OutputZ, chunked_cross_entropy
from qwen2.train.router import RouterLosses, share_counts
from qwen2.train.tensor_parallel import gather_tokens, vocabulary_share
from qwen2.train.ulysses import Ulysses
from qwen2.train.world import World


class PackedLoss(nn.Module):
    """`model` up to its cross-entropy, over the ranks of `world`; None: in one process."""

    def __init__(self, model: Qwen2, world: World | None = None) -> None:
        super().__init__()
        self.model, self.world = model, world or World.alone(model.device)

    def backward(
        self,
        batches: Sequence[PackedBatch],
        count: int,
        routers: RouterLosses | None = None,
        z: OutputZ | None = None,
        collect: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Gradients of the loss of a step's micro-batches, and of what `routers` add to it.

        Returns this rank's part of the loss, in fp64 and without its gradient. `collect` is called
        when the gradients of a micro-batch are there.
        """
        moe = self.model.config.moe
        total = torch.zeros((), dtype=torch.float64, device=self.model.device)
        for batch in batches:
            routing = Routing(moe, self.model.device) if moe else None
            part = self(batch, count, routing, z)
            total += part.detach()
            if routers and routing:
                part = part + routers.add(routing, len(batch.tokens))
            part.backward()
            collect()
        return total

    def forward(
        self,
        batch: PackedBatch,
        count: int | None = None,
        routing: Routing | None = None,
        z: OutputZ | None = None,
    ) -> Tensor:
        """Cross-entropy of a batch, summed and divided by `count` (None: their mean).

        What a mixture's routers did is added to `routing`, which is new. With `z` the z-loss is
        added, see loss.py; its parts are of this rank's tokens. All ranks that share
        tokens are given the same batch, of N tokens, which cp divides; `count` is over all ranks.
        """
        model, device, world = self.model, self.model.device, self.world
        tokens, targets = batch.tokens, batch.targets
        attention: AttentionContext = model.packed(batch.lengths)
        if world.mesh.cp > 1:
            group = world.views["rows"].get_group("cp")
            tokens, targets = (x.chunk(group.size())[group.rank()] for x in (tokens, targets))
            attention = Ulysses(attention, group)
        hidden = model.model(tokens.to(device), batch.positions.to(device), attention, routing)
        if routing:
            share_counts(routing, world)
        weight, share = model.lm_head.weight, None
        if world.mesh.tp > 1:
            hidden = gather_tokens(hidden, world.views["dense"]["tp"])
            weight, share = vocabulary_share(weight)
        return chunked_cross_entropy(hidden, weight, targets.to(device), count, z=z, share=share)
