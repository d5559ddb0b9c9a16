"""Excerpts of long documents: whole paragraphs, as many as fit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import Field

from qwen2.common.config import Config
from qwen2.tokenizer import Tokenizer

# Where a text may be cut: best between paragraphs, then lines, then sentences, then words.
_ENDS = (
    re.compile(r"\n\s*\n"),
    re.compile(r"\n"),
    re.compile(r"(?<=[.!?])\s+|(?<=[。！？])"),
    re.compile(r"\s+"),
)


class ExcerptConfig(Config):
    """How documents are cut."""

    tokens: int = Field(default=1024, ge=16)  # most, of an excerpt; of Qwen2's own tokenizer
    least: int = Field(default=64, ge=1)  # tokens; what is shorter is left out
    per_document: int = Field(default=4, ge=1)  # most, spread evenly over it


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A part of a document's text."""

    text: str
    start: int  # characters, as is `stop`
    stop: int


def cut(text: str, config: ExcerptConfig, tokenizer: Tokenizer) -> list[Excerpt]:
    """The excerpts of a document, in its order, without blanks around them."""
    excerpts: list[Excerpt] = []
    start = stop = size = 0
    for first, last, tokens in _pieces(text, 0, len(text), 0, config.tokens, tokenizer):
        if size and size + tokens > config.tokens:
            excerpts += _kept(text, start, stop, size, config)
            start, size = first, 0
        stop = last
        size += tokens
    excerpts += _kept(text, start, stop, size, config)
    count, most = len(excerpts), config.per_document
    return excerpts if count <= most else [excerpts[i * count // most] for i in range(most)]


def _kept(text: str, start: int, stop: int, size: int, config: ExcerptConfig) -> list[Excerpt]:
    part = text[start:stop]
    start += len(part) - len(part.lstrip())
    stripped = part.strip()
    if size < config.least or not stripped:
        return []
    return [Excerpt(stripped, start, start + len(stripped))]


def _pieces(
    text: str, start: int, stop: int, level: int, most: int, tokenizer: Tokenizer
) -> Iterator[tuple[int, int, int]]:
    """Parts (start, stop, tokens) that cover the text, none of more than `most` tokens.

    A part is a paragraph; a longer one is taken line by line, sentence by sentence, word by word.
    A word of more than `most` tokens is halved.
    """
    for first, last in _cuts(text, start, stop, level):
        tokens = len(tokenizer.encode(text[first:last]))
        if tokens <= most:
            yield first, last, tokens
        elif level + 1 < len(_ENDS):
            yield from _pieces(text, first, last, level + 1, most, tokenizer)
        else:
            middle = (first + last) // 2
            for half in ((first, middle), (middle, last)):
                yield from _pieces(text, *half, level, most, tokenizer)


def _cuts(text: str, start: int, stop: int, level: int) -> Iterator[tuple[int, int]]:
    """Parts that end behind each match, and the rest."""
    for match in _ENDS[level].finditer(text, start, stop):
        if start < match.end() < stop:
            yield start, match.end()
            start = match.end()
    if start < stop:
        yield start, stop
