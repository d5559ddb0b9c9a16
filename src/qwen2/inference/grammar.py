"""Text that follows a JSON schema, a regular expression or a Lark grammar, by `llguidance`.

Before a token is drawn, every one that the grammar does not allow is struck out; the rest of the
sampler stays as it is. An end of sequence is allowed where the text may end, and where nothing but
the end may follow the completion is over. Under `ignore_eos` no end of sequence is drawn: the text
goes on as long as the grammar lets it.

A grammar is a small program from a stranger. Its size, states and time are bounded, so that a bad
one is a UserError of one line (see grammar_check.py); one that breaks a bound later ends its own
completion with an error.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from qwen2.common.errors import UserError
from qwen2.inference.config import QueueFull
from qwen2.inference.grammar_check import (
    Checker,
    GrammarError,
    NoTimeError,
    compile_grammar,
    guarded,
    one_line,
    tokens_of,
)
from qwen2.inference.sampling import ConstraintError, Grammar
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.tokenizer import PRE_TOKENS

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MOST_BYTES = 64 * 1024  # of a grammar
MASK_SECONDS = 0.5  # of this thread's own time, for one mask: the engine waits meanwhile
KEPT = 64  # compiled grammars: servers get the same schema again and again


class Matching:
    """A grammar at work in one completion: the `Constraint` of its sampler."""

    def __init__(self, matcher: LLMatcher, vocabulary: int, ends: Tensor, may_end: bool) -> None:
        self._matcher, self._vocabulary = matcher, vocabulary
        self._ends, self._may_end = ends, may_end
        self._allowed: Tensor | None = None  # (vocabulary,) bool, of the next token
        self._more = True  # something other than the end may come next

    def mask(self, logits: Tensor) -> Tensor:
        """logits (V,) with -inf for every token that may not come next.

        Raises:
            ConstraintError: nothing may come, or to find out broke a bound.
        """
        return logits.masked_fill(~self.allowed(), -torch.inf)

    def accept(self, token: int) -> None:
        """`token` has come; if that breaks a bound, `mask` will say so."""
        self._allowed = None
        with contextlib.suppress(GrammarError):  # the matcher remembers it
            guarded(self._matcher.consume_token, token)

    @property
    def complete(self) -> bool:
        """Whether nothing but the end may follow."""
        try:
            self.allowed()
        except ConstraintError:
            return False
        return not self._more

    def allowed(self) -> Tensor:
        """What may come next, (V,) bool; raises as `mask`."""
        if self._allowed is None:
            try:
                self._allowed = self._compute()
            except GrammarError as error:
                raise ConstraintError(str(error)) from None
        return self._allowed

    def _compute(self) -> Tensor:
        matcher, started = self._matcher, time.thread_time()
        bits = guarded(matcher.compute_bitmask)
        accepting = guarded(matcher.is_accepting)
        if matcher.is_error():
            raise GrammarError(one_line(matcher.get_error()))
        if time.thread_time() - started > MASK_SECONDS:
            raise GrammarError("it takes too much time; simplify it")
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        mask = torch.from_numpy(allowed[: self._vocabulary]).bool()
        mask[self._ends] = False  # also where the grammar has them as text
        self._more = bool(mask.any())
        if not (self._more or accepting):
            raise GrammarError("it allows no token here")
        if accepting and self._may_end:
            mask[self._ends] = True
        return mask


class Grammars:
    """Compiles grammars for the tokens of one engine; to be called on any thread.

    `vocabulary`: ids that may be drawn; `stop_ids`: those that end a completion.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, stop_ids: frozenset[int]) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._stop_ids = sorted(id_ for id_ in stop_ids if id_ < vocabulary)
        self._checker = Checker(tokenizer.special_tokens, self._stop_ids, vocabulary)
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        self._kept: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    def knows(self, grammar: Grammar) -> bool:
        """Whether it is compiled already, so that `constraint` takes no time."""
        return grammar in self._kept

    def constraint(self, grammar: Grammar, ignore_eos: bool = False) -> Matching:
        """`grammar` at the beginning of a completion.

        Raises:
            UserError: it is none, too large, or takes too long; or llguidance is not installed.
            QueueFull: nobody could look at it, for others take the time.
        """
        with self._lock:
            if (kept := self._kept.get(grammar)) is not None:
                self._kept.move_to_end(grammar)
                return self._matching(kept.deep_copy(), not ignore_eos)
        if len(grammar.text.encode(errors="surrogatepass")) > MOST_BYTES:
            raise UserError(f"grammar: longer than {MOST_BYTES // 1024} KiB")
        tokens = self._own_tokens()
        try:
            self._checker.check(grammar.kind, grammar.text)
            matcher = compile_grammar(grammar.kind, grammar.text, tokens)
            self._try(matcher.deep_copy())
        except (GrammarError, ConstraintError) as error:
            raise UserError(f"grammar: {error}") from None
        except NoTimeError as error:
            raise QueueFull(str(error)) from None
        with self._lock:
            self._kept[grammar] = matcher
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
            return self._matching(matcher.deep_copy(), not ignore_eos)

    def _matching(self, matcher: LLMatcher, may_end: bool) -> Matching:
        return Matching(matcher, self._vocabulary, torch.tensor(self._stop_ids).long(), may_end)

    def _try(self, matcher: LLMatcher) -> None:
        """Take a first step: much that can never work breaks there, and is refused."""
        first = self._matching(matcher, may_end=False)
        if first.complete:
            raise GrammarError("it allows nothing but the empty text")
        first.accept(int(first.allowed().int().argmax()))
        first.allowed()

    def _own_tokens(self) -> LLTokenizer:
        """The vocabulary as llguidance has it; made at the first grammar, in about a second."""
        with self._lock:
            if self._tokens is None:
                tokenizer = self._tokenizer
                try:
                    self._tokens = tokens_of(
                        tokenizer.ranks, tokenizer.special_tokens, PRE_TOKENS,
                        self._stop_ids, self._vocabulary,
                    )  # fmt: skip
                except ImportError:
                    raise UserError(
                        "grammars need llguidance: pip install 'qwen2[serve]'"
                    ) from None
            return self._tokens
