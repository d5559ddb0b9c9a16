"""Which tokens of which requests the next pass computes: continuous batching with paged memory.

A pass takes first the next token of every running completion, then pieces of prompts that are
running, then waiting requests in the order of their arrival, up to a number of tokens. A prompt
gets all its blocks when it is admitted, so only completions grow. When one finds no block, the
latest arrived of the running gives all of its own back and waits at the front of the queue; later
it computes its prompt and its output so far again, and goes on as if nothing had been. The
earliest arrived is therefore never held up, and everything ends.

Running requests have always arrived before all waiting ones.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch

from qwen2.inference.blocks import BlockPool, chain, root_digest
from qwen2.inference.request import Request
from qwen2.inference.runner import Batch

BESIDE_DECODES = 512  # tokens of prompts in a pass for whose end completions wait
SCORED_ROWS = 256  # rows of logits (rows, V) for prompts' logprobs in a pass: 155 MB at V = 152k


@dataclass
class Part:
    """A request's share of a batch: ids from `start` on, `count` of them with the draft.

    Of their rows of logits `scored` are for the prompt's logprobs and then `draws` for new tokens:
    the last known id's, and one for each token of a draft.
    """

    request: Request
    start: int
    count: int
    scored: int = 0
    draws: int = 0


@dataclass
class Schedule(Batch):
    """A batch, and whose it is; and what it may still take."""

    parts: list[Part] = field(default_factory=list)
    room: int = 0  # tokens
    scores: int = 0  # rows of logits for prompts' logprobs


class Scheduler:
    """The queue of waiting requests, the running ones, and their blocks."""

    def __init__(
        self, pool: BlockPool, block_size: int, batch_tokens: int, max_running: int, model: bytes
    ) -> None:
        self.pool, self.block_size = pool, block_size
        self.batch_tokens, self.max_running, self.model = batch_tokens, max_running, model
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.preemptions = self.prompt_tokens = self.prefix_queries = self.prefix_hits = 0

    def schedule(self) -> Schedule:
        """The next pass; empty when there is nothing to do."""
        batch = Schedule(room=self.batch_tokens, scores=SCORED_ROWS)
        self._decode(batch)
        if batch.parts:
            batch.room = min(batch.room, BESIDE_DECODES)
        decoding = {part.request for part in batch.parts}
        for request in self.running:
            if request not in decoding:
                self._take(batch, request)
        while self.waiting and batch.room and len(self.running) < self.max_running:
            if not self._admit(self.waiting[0]):
                break
            self._take(batch, self.running[-1])
        return batch

    def remove(self, request: Request) -> None:
        """Neither wait nor run any more, and hold no blocks."""
        self._give_back(request)
        if request in self.running:
            self.running.remove(request)
        elif request in self.waiting:
            self.waiting.remove(request)

    def recover(self) -> list[Request]:
        """After a pass that was broken off wherever it was: all wait, and will be computed anew.

        Returns those that had just ended, without anyone being told.
        """
        everyone = dict.fromkeys([*self.running, *self.waiting])
        self.waiting = deque(request for request in everyone if request.finish_reason is None)
        self.running = []
        self.pool.recover()
        for request in everyone:
            self._forget_place(request)
        return [r for r in everyone if r.finish_reason is not None and r.finished is None]

    def _decode(self, batch: Schedule) -> None:
        """The next token of all that want but one, each with its draft."""
        index = 0
        while index < len(self.running):  # preemption takes from the end of the list
            request = self.running[index]
            if len(request.ids) - request.computed == 1:
                if not self._grow(request):
                    return
                self._fit_draft(request)
                self._take(batch, request)
            index += 1

    def _grow(self, request: Request) -> bool:
        """Have a block for the next token, at the cost of later requests; False: at its own."""
        while len(request.ids) > len(request.blocks) * self.block_size:
            blocks = self.pool.allocate(1)
            if blocks is not None:
                self._hold(request, blocks)
                continue
            last = self.running[-1]
            self._give_back(last)
            self.preemptions += 1
            self.waiting.appendleft(last)
            self.running.pop()
            if last is request:
                return False
        return True

    def _fit_draft(self, request: Request) -> None:
        """Keep of the draft what can be used; nobody is preempted for guesses."""
        # After the last guess that is right, one more token is drawn.
        draft = request.draft[: max(0, request.room - len(request.output) - 1)]
        known = len(request.ids)
        missing = self._blocks_for(known + len(draft)) - len(request.blocks)
        if missing > 0 and (blocks := self.pool.allocate(missing)) is not None:
            self._hold(request, blocks)
        request.draft = draft[: len(request.blocks) * self.block_size - known]

    def _admit(self, request: Request) -> bool:
        """Give the first of the waiting all blocks that its ids need, as far as there are any.

        One block stays free for each running request, lest this one is soon preempted for them.
        """
        known = len(request.ids)
        hits: list[int] = []
        if self.pool.keep and request.unscored >= len(request.prompt) - 1:
            # One token at least is computed: its logits or hidden state are wanted.
            hits = self.pool.match(self._digests(request, (known - 1) // self.block_size))
        missing = self._blocks_for(known) - len(hits)
        reserve = len(self.running)
        blocks = self.pool.allocate(missing) if missing + reserve <= self.pool.available else None
        if blocks is None:
            self.pool.release(hits)
            return False
        request.computed = len(hits) * self.block_size
        request.registered = len(hits)
        self._hold(request, hits + blocks)
        if not request.admitted:
            request.admitted = True
            request.cached_tokens = request.computed
            self.prompt_tokens += known
            self.prefix_queries += known if self.pool.keep else 0
            self.prefix_hits += request.computed
        self.running.append(request)
        self.waiting.popleft()
        return True

    def _take(self, batch: Schedule, request: Request) -> None:
        """Put as much of the request into the batch as there is room for."""
        start, known = request.computed, len(request.ids)
        end = min(known, start + batch.room)
        first = max(start, request.unscored)  # of the rows whose logits the prompt's logprobs want
        last = len(request.prompt) - 1
        if first < last:
            end = min(end, first + batch.scores)
        if end <= start:
            return
        whole = end == known
        draft = request.draft[: batch.room - (end - start)] if whole else []
        part = Part(request, start, end - start + len(draft))
        row = len(batch.tokens)  # of the first of these tokens
        part.scored = max(0, min(end, last) - first)
        batch.rows += range(row + first - start, row + first - start + part.scored)
        if whole and request.embed:
            batch.hidden_rows.append(row + part.count - 1)
        elif whole:
            part.draws = 1 + len(draft)
            batch.rows += range(row + part.count - part.draws, row + part.count)
        batch.tokens += request.ids[start:end] + draft
        batch.positions += range(start, start + part.count)
        batch.tables.append(request.table[: start + part.count])
        batch.blocks.append(request.blocks)
        batch.counts.append(part.count)
        batch.parts.append(part)
        batch.room -= part.count
        batch.scores -= part.scored
        self._register(request, end)

    def _register(self, request: Request, end: int) -> None:
        """Say what is in the blocks that ids before `end` fill.

        This pass will have written them before it reads them, so others may have them at once.
        """
        full = end // self.block_size
        if self.pool.keep and full > request.registered:
            digests = self._digests(request, full)
            for index in range(request.registered, full):
                self.pool.register(request.blocks[index], digests[index])
            request.registered = full

    def _digests(self, request: Request, count: int) -> list[bytes]:
        """Of the first `count` blocks of ids."""
        size, digests = self.block_size, request.digests
        for start in range(len(digests) * size, count * size, size):
            previous = digests[-1] if digests else root_digest(self.model, request.salt)
            digests.append(chain(previous, request.ids[start : start + size]))
        return digests[:count]

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def _hold(self, request: Request, blocks: list[int]) -> None:
        request.blocks += blocks
        first = torch.tensor(blocks)[:, None] * self.block_size
        slots = (first + torch.arange(self.block_size)).flatten()
        request.table = torch.cat([request.table, slots])

    def _give_back(self, request: Request) -> None:
        self.pool.release(request.blocks)
        self._forget_place(request)

    @staticmethod
    def _forget_place(request: Request) -> None:
        request.blocks, request.table = [], request.table[:0]
        request.computed = request.registered = 0
        request.draft = []
