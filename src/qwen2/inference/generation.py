"""Generation: sequences that share each forward pass, one new token a step for each.

    sequences = [Sequence(...), ...]
    while step(model, sequences): ...

A sequence owns its cache, so a conversation goes on where the last turn ended.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Many
from dataclasses import dataclass
from typing import Literal

import torch

from qwen2.common.errors import UserError
from qwen2.inference.detokenize import TextStream
from qwen2.inference.sampling import SamplingParams, sample
from qwen2.model.cache import KVCache
from qwen2.model.decoder import Qwen2
from qwen2.tokenizer import Tokenizer

PREFILL_CHUNK = 2048  # tokens of one prompt in one pass: bounds the memory of activations

FinishReason = Literal["stop", "length"]


class CachedTokens:
    """A cache and the ids that are in it, to be taken up again by a prompt that begins alike."""

    def __init__(self, model: Qwen2) -> None:
        self.cache = KVCache(model.config, model.dtype, model.device)
        self.ids: list[int] = []

    def keep_common_prefix(self, prompt: Many[int]) -> int:
        """Forget what `prompt` does not begin with; how many ids remain, less than its length."""
        common = 0
        self.ids = self.ids[: self.cache.length]  # an interrupted pass has left nothing behind
        for mine, theirs in zip(self.ids, prompt[:-1], strict=False):
            if mine != theirs:
                break
            common += 1
        self.ids = self.ids[:common]
        self.cache.truncate(common)
        return common


class Sequence:
    """One prompt and the completion that grows after it.

    Raises:
        UserError: an empty prompt, one outside the vocabulary, or one longer than the model's
            context.
    """

    def __init__(
        self,
        model: Qwen2,
        tokenizer: Tokenizer,
        prompt: Many[int],
        params: SamplingParams,
        cached: CachedTokens | None = None,
    ) -> None:
        context = model.config.context_length
        if not prompt:
            raise UserError("the prompt is empty; give at least one token")
        if not all(0 <= token < tokenizer.vocab_size for token in prompt):
            raise UserError(f"the prompt has ids beyond the tokenizer's {tokenizer.vocab_size}")
        if len(prompt) >= context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens and the model's context {context}; "
                "shorten the prompt"
            )
        model.fuse_projections()
        self.prompt, self.params = list(prompt), params
        self.output: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.text = TextStream(tokenizer, params.stop)
        self._ids = tokenizer.vocab_size  # further rows of the head are padding, without text
        self._stop_ids = frozenset() if params.ignore_eos else stop_ids(model, tokenizer)
        self._room = min(params.max_tokens, context - len(prompt))
        self._generator = params.generator()
        self._cached = cached or CachedTokens(model)
        start = self._cached.keep_common_prefix(self.prompt)
        self._pending = self.prompt[start:]

    @property
    def cache(self) -> KVCache:
        """Keys and values of what has been passed through the model."""
        return self._cached.cache

    def take(self) -> tuple[list[int], bool]:
        """Ids for the next pass, and whether a token is to be drawn after the last of them."""
        chunk, self._pending = self._pending[:PREFILL_CHUNK], self._pending[PREFILL_CHUNK:]
        self._cached.ids += chunk
        return chunk, not self._pending

    def draw(self, logits: torch.Tensor) -> str:
        """Draw the next token from logits (V,); the text that it completes."""
        token = sample(logits[: self._ids], self.prompt + self.output, self.params, self._generator)
        self.output.append(token)
        self._pending = [token]
        if token in self._stop_ids:
            self.finish_reason = "stop"
            return self.text.finish()
        text = self.text.push(token)
        if self.text.stopped:
            self.finish_reason = "stop"
        elif len(self.output) >= self._room:
            self.finish_reason = "length"
            text += self.text.finish()
        return text


@torch.inference_mode()
def step(model: Qwen2, sequences: Many[Sequence]) -> dict[int, str]:
    """One pass for all unfinished sequences: new text by index; empty when all are finished."""
    live = [index for index, sequence in enumerate(sequences) if not sequence.finish_reason]
    if not live:
        return {}
    chunks, drawing = zip(*(sequences[index].take() for index in live), strict=True)
    attention = model.cached([sequences[i].cache for i in live], [len(c) for c in chunks])
    tokens = torch.tensor([token for chunk in chunks for token in chunk], device=model.device)
    logits = model(
        tokens, attention.positions(model.device), attention, attention.last_rows(model.device)
    )  # (live, V)
    attention.advance()
    return {
        index: sequences[index].draw(row) if draws else ""
        for index, row, draws in zip(live, logits, drawing, strict=True)
    }


@dataclass(frozen=True)
class Completion:
    """What came of one prompt."""

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason

    @classmethod
    def of(cls, sequence: Sequence) -> Completion:
        """The completion of a finished sequence."""
        assert sequence.finish_reason is not None
        return cls(sequence.text.text, sequence.output, sequence.prompt, sequence.finish_reason)

    @property
    def usage(self) -> dict[str, int]:
        """Counts of tokens, under the names of the OpenAI API."""
        prompt, output = len(self.prompt_token_ids), len(self.token_ids)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": output,
            "total_tokens": prompt + output,
        }


def generate(
    model: Qwen2, tokenizer: Tokenizer, prompts: Many[Many[int]], params: SamplingParams
) -> list[Completion]:
    """Complete prompts of ids, all in one batch, in their order."""
    sequences = [Sequence(model, tokenizer, prompt, params) for prompt in prompts]
    while step(model, sequences):
        pass
    return [Completion.of(sequence) for sequence in sequences]


def stream(model: Qwen2, sequence: Sequence) -> Iterator[str]:
    """Text of one sequence as it comes; `Completion.of(sequence)` when it is exhausted."""
    while text := step(model, [sequence]):
        if text[0]:
            yield text[0]


def stop_ids(model: Qwen2, tokenizer: Tokenizer) -> frozenset[int]:
    """Every id that ends an answer: the checkpoint's own and both ends that ChatML knows.

    A base model that was tuned to chat often still names only `<|endoftext|>`, and would go on
    for ever.
    """
    own = model.config.eos_token_id
    ids = {own} if isinstance(own, int) else set(own or ())
    return tokenizer.stop_ids | ids | {tokenizer.im_end_id}
