"""A request: one prompt, the completion that grows after it, and its place in the cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from qwen2.inference.detokenize import TextStream
from qwen2.inference.logprobs import TokenLogprob as TokenLogprob
from qwen2.inference.sampling import Sampler, SamplingParams

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Output:
    """What one step adds to a completion; the last one has a finish reason.

    `stop_reason` is the stop string or the token id that ended it. `text` may be empty while a
    character or a possible stop string is incomplete.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None


@dataclass(eq=False)
class Request:
    """Made by `Engine.submit`; everyone may read it, and only the engine changes it.

    `room` bounds the output; `stop_ids` end it. `on_output` is called with every `Output`, on the
    thread that steps the engine.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    sampler: Sampler
    stream: TextStream
    room: int
    stop_ids: frozenset[int] = frozenset()
    salt: str = ""
    embed: bool = False
    on_output: Callable[[Output], None] | None = None

    output: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    embedding: Tensor | None = None  # (C,) fp32: the final hidden state of the prompt's last token
    cached_tokens: int = 0  # of the prompt, taken from the prefix cache
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    arrived: float = field(default_factory=time.monotonic)  # seconds, as are the next two
    first_token: float | None = None
    finished: float | None = None

    # What the scheduler keeps.
    ids: list[int] = field(default_factory=list)  # prompt and output
    draft: list[int] = field(default_factory=list)  # guesses of what comes next, to be verified
    computed: int = 0  # ids whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)
    table: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    digests: list[bytes] = field(default_factory=list)  # of full blocks of ids
    registered: int = 0  # blocks that the pool knows by their digest
    admitted: bool = False  # has been in the cache before

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        if self.params.prompt_logprobs is not None:
            self.prompt_logprobs = [None]

    @property
    def text(self) -> str:
        """All text so far."""
        return self.stream.text

    @property
    def unscored(self) -> int:
        """The first position whose logits the logprobs of the prompt still want."""
        return len(self.prompt) if self.prompt_logprobs is None else len(self.prompt_logprobs) - 1

    def append(self, token: int) -> str:
        """One more token of output; the text that it completes. Sets the finish reason."""
        if self.first_token is None:
            self.first_token = time.monotonic()
        self.output.append(token)
        self.ids.append(token)
        self.sampler.accept(token)
        if token in self.stop_ids:
            self.finish_reason, self.stop_reason = "stop", token
            return self.stream.finish()
        text = self.stream.push(token)
        if self.stream.stopped:
            self.finish_reason, self.stop_reason = "stop", self.stream.stopped_by
        elif self.sampler.complete:
            self.finish_reason = "stop"
            text += self.stream.finish()
        elif len(self.output) >= self.room:
            self.finish_reason = "length"
            text += self.stream.finish()
        return text


@dataclass(frozen=True)
class Completion:
    """What came of one prompt."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None
    error: str | None = None

    @classmethod
    def of(cls, request: Request) -> Completion:
        """The completion of a finished request."""
        assert request.finish_reason is not None
        return cls(
            request.text,
            request.output,
            request.prompt,
            request.finish_reason,
            request.stop_reason,
            request.logprobs,
            request.prompt_logprobs,
            request.error,
        )

    @property
    def usage(self) -> dict[str, int]:
        """Counts of tokens, under the names of the OpenAI API."""
        prompt, output = len(self.prompt_token_ids), len(self.token_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        }
