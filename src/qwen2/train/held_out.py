"""Bits per byte of held-out text by kind, while a run goes on and over all of its ranks.

By bytes and not by tokens, so that tokenizers can be compared. Documents are cut at the context,
without the overlap of evaluate/score.py: a run looks for changes, and pays for it every time.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from qwen2.common.errors import UserError
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.held_out import held_out_batches
from qwen2.tokens.packing import IGNORE, PackedBatch
from qwen2.tokens.shards import Shards
from qwen2.tokens.weighted import by_kind
from qwen2.train.packed_loss import PackedLoss


class HeldOut:
    """The first `tokens` tokens of each kind in `shards`, in batches of rows x context.

    Raises:
        UserError: `tokenizer` has no text for one of their ids.
    """

    def __init__(
        self, shards: Shards, tokenizer: Tokenizer, context: int, rows: int, tokens: int
    ) -> None:
        self._batches: dict[str, list[PackedBatch]] = {}
        self._bytes: dict[str, int] = {}
        for kind, source in by_kind(shards).items():
            end = shards.index.end_of_text
            batches = list(held_out_batches(source, end, context, rows, tokens))
            ids = [id_ for batch in batches for id_ in batch.targets.tolist() if id_ != IGNORE]
            size = len(tokenizer.decode_bytes(ids, skip_special=True))
            if size:
                self._batches[kind], self._bytes[kind] = batches, size
        if not self._bytes:
            raise UserError(f"held_out {shards.folder}: no text in it")

    @torch.no_grad()
    def bits_per_byte(self, loss: PackedLoss) -> dict[str, float]:
        """Of each kind, the same on all ranks, which must call this together."""
        world = loss.world
        ranks, rank = world.mesh.dp, world.dp_rank
        kinds = list(self._batches)
        nats = torch.zeros(len(kinds), dtype=torch.float64, device=world.device)
        for number, kind in enumerate(kinds):
            batches = self._batches[kind]
            for first in range(0, len(batches), ranks):
                batch = batches[min(first + rank, len(batches) - 1)]
                if first + rank >= len(batches):  # nothing is left, but the others are waiting
                    batch = replace(batch, targets=torch.full_like(batch.targets, IGNORE))
                nats[number] += loss(batch, 1)
        bits = (world.sum(nats, "data") / math.log(2)).tolist()
        return {kind: each / self._bytes[kind] for kind, each in zip(kinds, bits, strict=True)}
