"""Documents through a Qwen2 model: what each costs to predict, and its mean hidden state.

Both come of one pass. Documents lie end to end without padding, `BUDGET` tokens a pass at most, so
memory is bounded whatever their lengths. A document longer than the context is read in windows that
overlap by half, as in evaluate/score.py, whose figures these are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from qwen2.corpus.quality.config import Extent
from qwen2.evaluate.score import LOGIT_ROWS
from qwen2.model.decoder import Qwen2
from qwen2.tokenizer import Tokenizer

BUDGET = 2048  # tokens of a pass of several documents; one window may be longer
CHARACTERS = 16  # a token's, at most, where a long text is cut before it is tokenised

Floats = NDArray[np.float64]
Mean = NDArray[np.float32]


@dataclass(frozen=True)
class Readings:
    """What a model makes of some documents."""

    nats: Floats
    """-log p of all tokens that were read, the first one after `<|endoftext|>`, (documents,)."""
    tokens: Floats
    """How many these are, (documents,)."""
    bytes: Floats
    """Their bytes of UTF-8, (documents,)."""
    pooled: Mean
    """Mean over the tokens of the hidden states after the final norm, (documents, C)."""

    @property
    def perplexity(self) -> Floats:
        """exp of the mean loss of a token, (documents,); NaN of an empty text."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.exp(self.nats / self.tokens)

    @property
    def bits_per_byte(self) -> Floats:
        """Comparable between tokenizers, (documents,); NaN of an empty text."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.nats / np.log(2) / self.bytes


@dataclass(frozen=True)
class _Window:
    """Part of a document that one pass reads; what it has from `fresh` on counts."""

    document: int
    ids: Sequence[int]
    fresh: int
    is_first: bool
    target: int | None
    """The token after the window's last, if there is one."""


class Reader:
    """A model that reads documents."""

    def __init__(self, model: Qwen2, tokenizer: Tokenizer, extent: Extent) -> None:
        self.model, self.tokenizer, self.extent = model, tokenizer, extent
        self.context = min(extent.context, model.config.context_length)

    @torch.inference_mode()
    def read(self, texts: Sequence[str], *, loss: bool = True) -> Readings:
        """Read `texts`; without `loss` nothing is predicted, which saves the output head."""
        count, width = len(texts), self.model.config.hidden_size
        nats, sizes = np.zeros(count), np.zeros((2, count))
        pooled = np.zeros((count, width), np.float32)
        for windows in _passes(self._windows(texts, sizes)):
            for window, (own, hidden) in zip(windows, self._pass(windows, loss), strict=True):
                nats[window.document] += own
                pooled[window.document] += hidden
        pooled /= np.maximum(sizes[0], 1)[:, None].astype(np.float32)
        return Readings(nats if loss else np.full(count, np.nan), sizes[0], sizes[1], pooled)

    def _windows(self, texts: Sequence[str], sizes: Floats) -> Iterator[_Window]:
        """The windows of all texts; tokens and bytes of each are put into `sizes`."""
        for document, text in enumerate(texts):
            content, size = self._ids(text)
            sizes[:, document] = len(content), size
            ids = [self.tokenizer.end_of_text_id, *content]
            done = 0
            while content and done < len(ids):
                start = max(0, done - self.context // 2) if done else 0
                stop = min(start + self.context, len(ids))
                target = ids[stop] if stop < len(ids) else None
                yield _Window(document, ids[start:stop], done - start, not done, target)
                done = stop

    def _ids(self, text: str) -> tuple[list[int], int]:
        """The tokens that are read of a text, and their bytes."""
        most = self.extent.tokens
        if most is None:
            return self.tokenizer.encode(text), len(text.encode("utf-8", "replace"))
        cut = text[: most * CHARACTERS]
        ids = self.tokenizer.encode(cut)
        if len(ids) <= most and len(cut) == len(text):
            return ids, len(text.encode("utf-8", "replace"))
        return ids[:most], len(self.tokenizer.decode_bytes(ids[:most]))

    def _pass(self, windows: Sequence[_Window], loss: bool) -> Iterator[tuple[float, Mean]]:
        """Sum of nats and of hidden states (C,) of the fresh part of each window."""
        device = self.model.device
        lengths = [len(window.ids) for window in windows]
        tokens = torch.tensor([i for window in windows for i in window.ids], device=device)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        hidden = self.model.model(tokens, positions, self.model.packed(lengths))  # (N, C)
        each = zip(windows, hidden.split(lengths), tokens.split(lengths), strict=True)
        for window, own, ids in each:
            known = ids[window.fresh + 1 :]
            if window.target is not None:
                known = torch.cat([known, known.new_tensor([window.target])])
            rows = own[window.fresh : window.fresh + len(known)]
            # <|endoftext|> itself says nothing of the text.
            content = own[1 if window.is_first else window.fresh :]
            yield self._nats(rows, known) if loss else 0.0, content.float().sum(0).cpu().numpy()

    def _nats(self, hidden: Tensor, targets: Tensor) -> float:
        """-log p of targets (n,) after hidden states (n, C); few rows of logits at a time."""
        parts = zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
        return sum(
            float(F.cross_entropy(self.model.lm_head(rows).float(), goal, reduction="sum"))
            for rows, goal in parts
        )


def _passes(windows: Iterator[_Window]) -> Iterator[list[_Window]]:
    """Windows of about `BUDGET` tokens together, in their order."""
    some: list[_Window] = []
    size = 0
    for window in windows:
        if some and size + len(window.ids) > BUDGET:
            yield some
            some, size = [], 0
        some.append(window)
        size += len(window.ids)
    if some:
        yield some
