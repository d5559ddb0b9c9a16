"""One pass of the model over a batch.

A runner knows nothing of requests: it gets ids, positions and places in the cache, and gives back
logits. A few tokens go through the native step, where it can run the model; more, and other models,
through the module's own pass, whose large products PyTorch does best.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen2.model import kernels
from qwen2.model.cache import KVStore
from qwen2.model.decode_step import DecodeStep
from qwen2.model.decoder import Qwen2


@dataclass
class Batch:
    """New tokens of some sequences, laid end to end.

    tables[i] (S_i,): int64 slots on the CPU of all tokens of sequence i, the counts[i] new ones
    last; blocks[i]: the same in blocks, the last perhaps not full. A table may contain slots that
    another sequence of the same batch fills: their keys and values are to be written, layer by
    layer, before any are read.
    """

    tokens: list[int] = field(default_factory=list)  # (N,)
    positions: list[int] = field(default_factory=list)  # (N,)
    tables: list[Tensor] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)  # of the N, those whose logits are wanted
    hidden_rows: list[int] = field(default_factory=list)  # whose final hidden states are wanted
    hidden: Tensor | None = None  # (len(hidden_rows), C) fp32 on the CPU, which `run` fills in


FEW = 32  # tokens, up to which the native step is the faster one


class Runner:
    """The forward pass, with the head on the wanted rows only."""

    def __init__(self, model: Qwen2, store: KVStore, block_size: int) -> None:
        self.model, self.store = model, store
        self.step: DecodeStep | None = None
        if kernels.TABLE["step"].pick(model, store) == kernels.NATIVE_STEP:
            self.step = DecodeStep(model, store, block_size)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Tensor:
        """Logits (len(batch.rows), V), fp32 on the CPU; also fills in `batch.hidden`."""
        if self.step is not None and len(batch.tokens) <= FEW and not batch.hidden_rows:
            return self.step(batch.tokens, batch.positions, batch.counts, batch.blocks, batch.rows)
        model, device = self.model, self.model.device
        attention = model.cached(self.store, batch.tables, batch.counts)
        tokens = torch.tensor(batch.tokens, device=device)
        positions = torch.tensor(batch.positions, device=device)
        hidden = model.model(tokens, positions, attention)  # (N, C)
        if batch.hidden_rows:
            batch.hidden = hidden[batch.hidden_rows].float().cpu()
        if not batch.rows:
            return torch.empty((0, model.config.vocab_size))
        if len(batch.rows) < len(batch.tokens):
            hidden = hidden[batch.rows]
        if self.step is not None and len(hidden) <= FEW:
            return self.step.logits(hidden)
        return model.lm_head(hidden).float().cpu()
