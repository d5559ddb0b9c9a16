"""Speculative decoding: cheap guesses of what comes next, verified many at a time.

Leviathan et al. 2023 (arXiv 2211.17192). One pass of the model scores the last token and all
guesses after it, at little more than the cost of one token where the weights' way from memory is
what takes the time. Guesses come from the text itself (prompt lookup decoding: what followed the
last time that these tokens came) or from a small draft model.

Deviation: the paper accepts a guess with probability min(1, p/q) and repairs the rest. Here each
token is drawn from the model's own distribution p with the completion's own seed, as without
guesses, and a guess is right if it equals what was drawn. The output is the same, token for token,
and so is its distribution. As every guess is the likeliest of its source (q = 1 there) it is right
with probability p, exactly as in the paper. Penalties and grammars hold, for each draw knows all
tokens before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol
from weakref import WeakKeyDictionary

import numpy as np

from qwen2.inference.request import Request
from qwen2.inference.runner import FEW

LARGE = 8  # running requests: beyond it a pass is bound by arithmetic, and no guess is free
LONGEST, SHORTEST = 4, 2  # tokens that must come again, for prompt lookup
PATIENT = 3  # passes in a row without a right guess, until a request rests
LONGEST_REST = 128  # tokens


class Proposer(Protocol):
    """Where guesses come from."""

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """For each request at most so many tokens that may follow its ids; perhaps none."""

    def forget(self) -> None:
        """A pass was broken off: keep nothing that may be half done."""


@dataclass
class Pace:
    """How many tokens a request's guesses may be, by how the last ones did; `most` at most.

    All right: twice as many the next time; else one more than were right. After `PATIENT` passes
    in a row without any, it rests for 2 ** passes tokens, `LONGEST_REST` at most, and tries again.
    """

    most: int
    size: int
    misses: int = 0  # passes in a row
    rest_until: int = 0  # tokens of output

    def learn(self, proposed: int, right: int, output: int) -> None:
        """`right` of `proposed` tokens were; the output has `output` tokens now."""
        self.size = min(self.most, 2 * proposed) if right == proposed else right + 1
        self.misses = 0 if right else self.misses + 1
        if self.misses >= PATIENT:
            self.rest_until = output + min(2 ** min(self.misses, 10), LONGEST_REST)


class Speculator:
    """Gives running requests their guesses: at most `most` each, and none when many run.

    A pass has `batch_tokens` at most; it is kept to the few that cost about as much as one.
    """

    def __init__(self, proposer: Proposer, most: int, batch_tokens: int) -> None:
        self.proposer, self.most = proposer, most
        self._pass = min(FEW, batch_tokens)
        self._paces: WeakKeyDictionary[Request, Pace] = WeakKeyDictionary()
        self.proposed = self.accepted = 0

    def propose(self, running: Sequence[Request]) -> None:
        """Set the drafts of those whose next token is due."""
        if not running or len(running) > LARGE:
            return
        share = min(self.most, self._pass // len(running) - 1)
        wanted = []
        for request in running:
            if request.embed or len(request.ids) - request.computed != 1:
                continue
            pace = self._paces.setdefault(request, Pace(self.most, self.most))
            # After the last guess that is right, one more token is drawn.
            count = min(share, pace.size, request.room - len(request.output) - 1)
            if count > 0 and len(request.output) >= pace.rest_until:
                wanted.append((request, count))
        if not wanted:
            return
        for (request, _), draft in zip(wanted, self.proposer.propose(wanted), strict=True):
            request.draft = draft

    def learn(self, request: Request, proposed: int, right: int) -> None:
        """The model has verified `proposed` guesses, of which the first `right` were right."""
        self.proposed += proposed
        self.accepted += right
        if proposed and request in self._paces:
            self._paces[request].learn(proposed, right, len(request.output))

    def forget(self) -> None:
        """A pass was broken off."""
        self.proposer.forget()


class PromptLookup:
    """Guesses what followed the latest earlier occurrence of the last few tokens.

    Saxena 2023, prompt lookup decoding. The most tokens that come again, from `LONGEST` down to
    `SHORTEST`, decide which; then the latest.
    """

    def __init__(self) -> None:
        self._texts: WeakKeyDictionary[Request, _Text] = WeakKeyDictionary()

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        """As `Proposer`."""
        return [
            continuation(self._texts.setdefault(request, _Text()).of(request.ids), count)
            for request, count in wanted
        ]

    def forget(self) -> None:
        """Nothing here can be half done that is not mended by the next call."""


class _Text:
    """Ids that only grow, as an array that is not made anew for every token."""

    def __init__(self) -> None:
        self._buffer, self._known = np.empty(256, np.int32), 0

    def of(self, ids: Sequence[int]) -> np.ndarray:
        """ids (T,) as an array."""
        known, self._known = self._known, len(ids)
        if len(self._buffer) < len(ids):
            grown = np.empty(2 * len(ids), np.int32)
            grown[:known] = self._buffer[:known]
            self._buffer = grown
        self._buffer[known : len(ids)] = ids[known:]
        return self._buffer[: len(ids)]


def continuation(ids: np.ndarray, count: int) -> list[int]:
    """`count` tokens that followed when the end of ids (T,) came before; none if it never did.

    Where the occurrence is so late that fewer follow, the repetition is taken to go on.
    """
    T = len(ids)
    ends = np.flatnonzero(ids[:-1] == ids[-1])  # where occurrences of the last n tokens end
    for n in range(2, LONGEST + 1):
        longer = ends[ends >= n - 1]
        longer = longer[ids[longer - (n - 1)] == ids[T - n]] if n <= T else longer[:0]
        if not len(longer):
            if n <= SHORTEST:
                return []
            break
        ends = longer
    first = int(ends[-1]) + 1
    period = T - first
    return [int(ids[first + place % period]) for place in range(count)]
