"""The engine: many requests share each pass of the model.

    request = engine.submit(prompt, params)
    while engine.step(): ...

Greedy output in fp32 does not depend on what else is in the batch, on the sizes of prefill chunks,
on the prefix cache or on preemption, as long as no two logits lie within rounding (about 1e-5) of
each other; with a seed the same holds of sampling. In bf16 sums over other groupings of rows round
differently in the third digit, so two nearly equal tokens may change places.
"""

from __future__ import annotations

import itertools
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qwen2.common.errors import UserError
from qwen2.common.runtime import keep_freed_memory
from qwen2.inference.blocks import BlockPool
from qwen2.inference.config import (
    EngineConfig,
    EngineDead,
    EngineStats,
    QueueFull,
    default_kv_tokens,
    identity_of,
    stop_ids,
)
from qwen2.inference.detokenize import TextStream
from qwen2.inference.draft import DraftModel
from qwen2.inference.grammar import Grammars
from qwen2.inference.logprobs import TokenLogprob, token_logprobs
from qwen2.inference.request import Completion, FinishReason, Output, Request
from qwen2.inference.runner import Runner
from qwen2.inference.sampling import Constraint, ConstraintError, Sampler, SamplingParams
from qwen2.inference.scheduler import Part, Schedule, Scheduler
from qwen2.inference.speculate import LARGE, PromptLookup, Speculator
from qwen2.model import kernels
from qwen2.model.cache import KVStore
from qwen2.model.decoder import Qwen2
from qwen2.tokenizer import Tokenizer

__all__ = ["Engine", "EngineConfig", "EngineDead", "EngineStats", "QueueFull"]

KEPT = 1 << 28  # bytes that a pass has freed and the next will want


class Engine:
    """Completions of a model, any number at a time; to be used from one thread (see thread.py).

    `model` is the model itself, with `tokenizer`, or the name of a checkpoint as for `qwen2.load`.
    """

    def __init__(
        self,
        model: Qwen2 | str | Path,
        tokenizer: Tokenizer | None = None,
        config: EngineConfig | None = None,
        *,
        draft: Qwen2 | None = None,
    ) -> None:
        if not isinstance(model, Qwen2):
            from qwen2.model.hub import load

            model, own = load(model)
            tokenizer = tokenizer or own
        if tokenizer is None:
            raise UserError("a model alone has no text: give its tokenizer too")
        self.config = config = config or EngineConfig()
        keep_freed_memory(KEPT)
        kernels.tune(model.device)
        model.fuse_projections()
        self.model, self.tokenizer = model, tokenizer
        self.vocabulary = min(tokenizer.vocab_size, model.config.vocab_size)
        tokens = config.kv_tokens or default_kv_tokens(model, config.max_running)
        blocks = -(-tokens // config.block_size)
        store = KVStore(
            model.config, blocks * config.block_size, model.dtype, model.device,
            model.key_biases() if config.kv_dtype == "int8" else None,
        )  # fmt: skip
        self.runner = Runner(model, store, config.block_size)
        self.scheduler = Scheduler(
            BlockPool(blocks, config.prefix_cache),
            config.block_size, config.max_batch_tokens, config.max_running, identity_of(model),
        )  # fmt: skip
        self._pool_tokens = store.slots
        self._stop_ids = stop_ids(model, tokenizer)
        self._grammars = Grammars(tokenizer, self.vocabulary, self._stop_ids)
        self.speculator = self._speculator(draft)
        self._ids = itertools.count()
        self._generated = 0

    @property
    def context_length(self) -> int:
        """Tokens of the longest sequence: the model's context, or the pool's if that is less."""
        return min(self.model.config.context_length, self._pool_tokens)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.scheduler.running or self.scheduler.waiting)

    @property
    def stats(self) -> EngineStats:
        """Figures of now; may be read from any thread."""
        s = self.scheduler
        return EngineStats(
            len(s.running), len(s.waiting), s.pool.held / s.pool.size, s.prefix_queries,
            s.prefix_hits, s.preemptions, s.prompt_tokens, self._generated,
            self.speculator.proposed if self.speculator else 0,
            self.speculator.accepted if self.speculator else 0,
        )  # fmt: skip

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        salt: str = "",
        on_output: Callable[[Output], None] | None = None,
        embed: bool = False,
    ) -> Request:
        """Take on a request; `salt` keeps its prefixes apart from those of other salts.

        With `embed` it ends with the prompt, whose last final hidden state becomes `embedding`.

        Raises:
            UserError: what can never be done, in one line.
            QueueFull: `max_queue` requests wait, or others' grammars take too long.
        """
        request = self.prepare(prompt, params, salt=salt, on_output=on_output, embed=embed)
        self.enqueue(request)
        return request

    def prepare(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        salt: str = "",
        on_output: Callable[[Output], None] | None = None,
        embed: bool = False,
    ) -> Request:
        """The first half of `submit`: check everything; may be called on any thread."""
        prompt = _as_ids(prompt)
        room = self._check(prompt, params, embed)
        return Request(
            next(self._ids), prompt, params, Sampler(params, prompt, self._constraint(params)),
            TextStream(self.tokenizer, params.stop), room,
            frozenset() if params.ignore_eos else self._stop_ids, salt, embed, on_output,
        )  # fmt: skip

    def takes_long(self, params: SamplingParams) -> bool:
        """Whether `prepare` has a grammar to compile first; may be called on any thread."""
        return params.grammar is not None and not self._grammars.knows(params.grammar)

    def enqueue(self, request: Request) -> None:
        """The second half of `submit`."""
        if len(self.scheduler.waiting) >= self.config.max_queue:
            raise QueueFull(f"{self.config.max_queue} requests wait already; try again later")
        self.scheduler.waiting.append(request)

    def cancel(self, request: Request) -> None:
        """End a request now; nothing happens if it has ended."""
        if request.finished is None:
            self._finish(request, "cancelled")

    def end_all(self, reason: FinishReason, error: str | None = None) -> None:
        """End every request for this reason."""
        for request in [*self.scheduler.running, *self.scheduler.waiting]:
            self._finish(request, reason, error)

    def step(self) -> bool:
        """One pass of the model for as many requests as fit; whether work remains.

        If it is broken off by an exception or Ctrl-C, every request waits again as it was before,
        and may be cancelled.
        """
        try:
            if self.speculator is not None:
                self.speculator.propose(self.scheduler.running)
            batch = self.scheduler.schedule()
            if batch.parts:
                logits = self.runner.run(batch)
                self.postprocess(batch, logits)
        except BaseException:
            if self.speculator is not None:
                self.speculator.forget()
            for request in self.scheduler.recover():
                self._emit(request, "")
            raise
        return self.has_work

    @torch.inference_mode()
    def postprocess(self, batch: Schedule, logits: Tensor) -> None:
        """Give every request what logits (rows, V) and hidden states of the pass say of it."""
        self.scheduler.pool.settle()
        # NumPy, for waking PyTorch's threads takes longer than this; NaN is the highest of all.
        known = logits[:, : self.vocabulary].numpy()
        likeliest = known.argmax(-1)
        finite = np.isfinite(known[range(len(known)), likeliest]).tolist()
        best = likeliest.tolist()
        embeddings = iter(() if batch.hidden is None else batch.hidden)
        row = 0
        for part in batch.parts:
            request = part.request
            request.computed = part.start + part.count
            first, row = row, row + part.scored + part.draws
            if not all(finite[first:row]):
                self._finish(request, "error", "the model's logits are not finite numbers")
                continue
            if part.scored:
                self._score(part, logits[first : first + part.scored])
            if part.draws:
                self._draw(part, logits[row - part.draws : row], best[row - part.draws : row])
            elif request.embed and request.computed == len(request.ids):
                request.embedding = next(embeddings)
                self._finish(request, "stop")

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams],
    ) -> list[Completion]:
        """Complete all prompts, text or ids, with one set of parameters or one each; in order.

        Raises:
            UserError: a prompt or parameters that cannot be; nothing is generated then.
        """
        many = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        requests = [
            self.prepare(self._encode(prompt), own)
            for prompt, own in zip(prompts, many, strict=True)
        ]
        try:
            self.scheduler.waiting.extend(requests)  # the queue's bound is for strangers
            for request in requests:
                while request.finish_reason is None:
                    self.step()
        finally:
            for request in requests:
                self.cancel(request)
        return [Completion.of(request) for request in requests]

    def stream(self, prompt: str | Sequence[int], params: SamplingParams) -> Iterator[Output]:
        """Complete one prompt, and yield what each step adds; to stop early ends the request."""
        outputs: list[Output] = []
        request = self.submit(self._encode(prompt), params, on_output=outputs.append)
        try:
            while outputs or request.finish_reason is None:
                while outputs:
                    yield outputs.pop(0)
                if request.finish_reason is None:
                    self.step()
        finally:
            self.cancel(request)

    def forget(self) -> None:
        """The model's weights have changed: use nothing that was computed with the old ones."""
        self.scheduler.recover()
        self.scheduler.pool.forget()

    def _encode(self, prompt: str | Sequence[int]) -> Sequence[int]:
        if not isinstance(prompt, str):
            return prompt
        # A document begins after the end of another, so an empty prompt is that end.
        return self.tokenizer.encode(prompt) or [self.tokenizer.end_of_text_id]

    def _check(self, prompt: list[int], params: SamplingParams, embed: bool) -> int:
        """How many tokens may follow the prompt; a UserError if the request cannot be."""
        known, context = self.vocabulary, self.model.config.context_length
        if not prompt:
            raise UserError("the prompt is empty; give at least one token")
        if min(prompt) < 0 or max(prompt) >= known:
            raise UserError(f"the prompt has ids beyond the tokenizer's {known}")
        if not all(0 <= token < known for token in params.logit_bias):
            raise UserError(f"logit_bias has ids beyond the tokenizer's {known}")
        length = len(prompt)
        if length > context or (length == context and not embed):
            raise UserError(
                f"the prompt has {length} tokens and the model's context {context}; "
                "shorten the prompt"
            )
        room = 0 if embed else min(params.max_tokens, context - length)
        # The last token of the output is never computed, so it has no place in the pool.
        if length + max(room - 1, 0) > self._pool_tokens:
            raise UserError(
                f"the prompt has {length} tokens and up to {room} may follow, but the cache holds "
                f"{self._pool_tokens}; lower max_tokens or raise kv_tokens"
            )
        return room

    def _constraint(self, params: SamplingParams) -> Constraint | None:
        """The grammar of a completion at work."""
        if params.grammar is None:
            return None
        return self._grammars.constraint(params.grammar, params.ignore_eos)

    def _speculator(self, draft: Qwen2 | None) -> Speculator | None:
        """Who guesses what comes next, if anybody."""
        config, proposer = self.config, None
        if not config.speculate:
            if draft is not None:
                raise UserError("a draft model needs speculate: how many tokens it guesses")
            return None
        if draft is not None:
            tokens = min(self._pool_tokens, default_kv_tokens(draft, LARGE))
            proposer = DraftModel(
                draft, self.vocabulary, tokens, config.block_size, config.max_batch_tokens
            )
        return Speculator(proposer or PromptLookup(), config.speculate, config.max_batch_tokens)

    def _score(self, part: Part, logits: Tensor) -> None:
        """Logprobs of the prompt's tokens from logits (scored, V) of those before them."""
        request = part.request
        assert request.prompt_logprobs is not None
        assert request.params.prompt_logprobs is not None
        begin = len(request.prompt_logprobs)
        tokens = request.prompt[begin : begin + part.scored]
        request.prompt_logprobs += token_logprobs(
            logits, tokens, request.params.prompt_logprobs, self.vocabulary
        )

    def _draw(self, part: Part, logits: Tensor, best: list[int]) -> None:
        """Draw tokens from logits (draws, V): one, and one more for each guess that was right."""
        request = part.request
        guesses, request.draft = request.draft[: part.draws - 1], []
        tokens: list[int] = []
        text = ""
        right = 0
        for row, guess in enumerate([*guesses, None]):
            try:
                token = self._next(request, logits[row], best[row])
            except ConstraintError as error:
                request.finish_reason, request.error = "error", f"grammar: {error}"
                text += request.stream.finish()
                break
            tokens.append(token)
            text += request.append(token)
            right += token == guess
            if request.finish_reason is not None or token != guess:
                break
        # Keys and values of wrong guesses will be written over.
        request.computed -= part.draws - len(tokens)
        self._generated += len(tokens)
        if self.speculator is not None:
            self.speculator.learn(request, len(guesses), right)
        logprobs: list[TokenLogprob] = []
        if request.params.logprobs is not None and tokens:
            top = request.params.logprobs
            logprobs = token_logprobs(logits[: len(tokens)], tokens, top, self.vocabulary)
            request.logprobs += logprobs
        if request.finish_reason is not None:
            self.scheduler.remove(request)
        self._emit(request, text, tokens, logprobs)

    def _next(self, request: Request, logits: Tensor, best: int) -> int:
        """A token after logits (V,), of which `best` is the likeliest."""
        if request.params.greedy and request.params.plain:
            return best
        return request.sampler.draw(logits[: self.vocabulary])

    def _finish(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End a request other than by its last token."""
        self.scheduler.remove(request)
        request.finish_reason, request.error = reason, error
        self._emit(request, request.stream.finish())

    def _emit(
        self,
        request: Request,
        text: str,
        tokens: Sequence[int] = (),
        logprobs: Sequence[TokenLogprob] = (),
    ) -> None:
        """Tell whoever waits for the request what is new."""
        if request.finish_reason is not None:
            request.finished = time.monotonic()
        if request.on_output is None:
            return
        output = Output(
            text, tuple(tokens), tuple(logprobs),
            request.finish_reason, request.stop_reason, request.error,
        )  # fmt: skip
        try:
            request.on_output(output)
        except Exception:  # whoever waited is gone: that is no reason for others to suffer
            request.on_output = None
            self.cancel(request)


def _as_ids(prompt: Sequence[int]) -> list[int]:
    try:
        return array("q", list(prompt)).tolist()
    except (TypeError, OverflowError):
        raise UserError("the prompt is no sequence of token ids, which are integers") from None
