"""Guesses of a draft model: a smaller Qwen2 of the same tokenizer, with a cache of its own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qwen2.common.errors import UserError
from qwen2.inference.blocks import BlockPool
from qwen2.inference.request import Request
from qwen2.inference.runner import Batch, Runner
from qwen2.model.cache import KVStore
from qwen2.model.decoder import Qwen2


@dataclass(eq=False)
class Place:
    """What the draft model's cache has of one request."""

    ids: list[int] = field(default_factory=list)  # of the request, then guesses
    known: int = 0  # ids that are the request's own, and so stay
    computed: int = 0  # ids whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)
    table: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))

    def follow(self, ids: Sequence[int]) -> None:
        """The request's ids now: keep what was guessed right, and compute one token at least."""
        kept, most = self.known, min(self.computed, len(ids) - 1)
        while kept < most and self.ids[kept] == ids[kept]:
            kept += 1
        kept = min(kept, most)
        self.ids[kept:] = ids[kept:]
        self.known, self.computed = len(ids), kept


class DraftModel:
    """The likeliest tokens by `model`, for several requests in common passes.

    A place in the cache is kept for each request while there is room; of a request that has lost
    it, all is computed again. `vocabulary`: the ids that may be guessed, which are the tokenizer's,
    so that target and draft may have different numbers of rows beyond.
    """

    def __init__(
        self, model: Qwen2, vocabulary: int, tokens: int, block_size: int, batch_tokens: int
    ) -> None:
        if model.config.vocab_size < vocabulary:
            raise UserError(
                f"the draft model has {model.config.vocab_size} tokens and the tokenizer "
                f"{vocabulary}; take one of the same tokenizer"
            )
        model.fuse_projections()
        blocks = -(-tokens // block_size)
        store = KVStore(model.config, blocks * block_size, model.dtype, model.device)
        self.runner, self.pool = Runner(model, store, block_size), BlockPool(blocks, keep=False)
        self.vocabulary, self.block_size, self.batch_tokens = vocabulary, block_size, batch_tokens
        self.context = model.config.context_length
        self.places: OrderedDict[Request, Place] = OrderedDict()  # the latest used last

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """As `Proposer`."""
        for request in [r for r in self.places if r.finish_reason is not None]:
            self._drop(request)
        chosen = {request for request, _ in wanted}
        guesses: dict[Request, list[int]] = {request: [] for request, _ in wanted}
        counts: dict[Request, int] = {}
        for request, count in wanted:
            count = min(count, self.context - len(request.ids) + 1)
            if count > 0 and self._has_room(request, len(request.ids) + count - 1, chosen):
                self.places[request].follow(request.ids)
                counts[request] = count
        while counts:
            tokens = self._next([self.places[request] for request in counts])
            for request, token in zip(list(counts), tokens, strict=True):
                guesses[request].append(token)
                if len(guesses[request]) < counts[request]:
                    self.places[request].ids.append(token)
                else:
                    del counts[request]
        return list(guesses.values())

    def forget(self) -> None:
        """As `Proposer`."""
        self.places.clear()
        self.pool.recover()

    def _has_room(self, request: Request, length: int, chosen: set[Request]) -> bool:
        """Have blocks for `length` tokens, at the cost of those who are not chosen now."""
        place = self.places.setdefault(request, Place())
        self.places.move_to_end(request)
        missing = -(-length // self.block_size) - len(place.blocks)
        if missing <= 0:
            return True
        for other in [r for r in self.places if r not in chosen]:
            if missing <= self.pool.available:
                break
            self._drop(other)
        blocks = self.pool.allocate(missing)
        if blocks is None:
            self._drop(request)
            return False
        place.blocks += blocks
        first = torch.tensor(blocks)[:, None] * self.block_size
        place.table = torch.cat([place.table, (first + torch.arange(self.block_size)).flatten()])
        return True

    def _drop(self, request: Request) -> None:
        self.pool.release(self.places.pop(request).blocks)

    def _next(self, places: Sequence[Place]) -> list[int]:
        """The likeliest token after the ids of each place."""
        likeliest: dict[Place, int] = {}
        while pending := [place for place in places if place.computed < len(place.ids)]:
            batch, parts, ended = Batch(), [], []
            for place in pending:
                start = place.computed
                end = min(len(place.ids), start + self.batch_tokens - len(batch.tokens))
                if end == start:
                    break
                batch.tokens += place.ids[start:end]
                batch.positions += range(start, end)
                batch.tables.append(place.table[:end])
                batch.blocks.append(place.blocks)
                batch.counts.append(end - start)
                parts.append((place, end))
                if end == len(place.ids):
                    ended.append(place)
                    batch.rows.append(len(batch.tokens) - 1)
            logits = self.runner.run(batch)
            for place, end in parts:
                place.computed = end
            if ended:
                best = logits[:, : self.vocabulary].argmax(-1).tolist()
                likeliest |= dict(zip(ended, best, strict=True))
        return [likeliest[place] for place in places]
