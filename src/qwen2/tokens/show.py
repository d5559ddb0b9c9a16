"""A batch as text: which documents its rows are made of, where they come from, what they say."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from qwen2.tokenizer import Tokenizer
from qwen2.tokens.loader import PackedLoader, TokenSource
from qwen2.tokens.packing import NOTHING, Piece
from qwen2.tokens.shard_file import Origin
from qwen2.tokens.shards import Shards


class Segment(NamedTuple):
    """Text, or the name of a special token."""

    text: str
    special: bool


@dataclass(frozen=True)
class ShownPiece:
    """Tokens start:stop of a document of `length` tokens; its positions count from 0."""

    document: int
    """Its number in the shards; `NOTHING`: padding."""
    kind: str
    origin: Origin | None
    start: int
    stop: int
    length: int
    ids: list[int]
    segments: list[Segment]

    @property
    def tokens(self) -> int:
        """How many of the row's."""
        return self.stop - self.start

    @property
    def title(self) -> str:
        """What it is, in one line."""
        if self.document == NOTHING:
            return f"padding, {self.tokens:,} tokens"
        part = f"tokens {self.start:,} to {self.stop:,} of {self.length:,}"
        if self.tokens == self.length:
            part = f"all {self.length:,} tokens"
        return f"{self.kind}, document {self.document:,}, {part}"

    @property
    def where_from(self) -> str:
        """Its origin in one line; empty where that was not noted."""
        if self.origin is None:
            return ""
        decisions = ""
        if self.origin.part is not None:
            decisions = f"decisions in {self.origin.part}, row {self.origin.row}"
        parts = (self.origin.id, self.origin.source, self.origin.language, decisions)
        return " · ".join(part for part in dict.fromkeys(parts) if part)  # an id may be a path

    def as_json(self) -> dict[str, Any]:
        """All of it, for machines."""
        return {
            "document": None if self.document == NOTHING else self.document,
            "kind": self.kind,
            "origin": self.origin and self.origin._asdict(),
            "start": self.start,
            "stop": self.stop,
            "length": self.length,
            "ids": self.ids,
            "text": "".join(segment.text for segment in self.segments),
        }


@runtime_checkable
class Derived(Protocol):
    """A source made of others, such as those of one kind."""

    def beneath(self, number: int) -> tuple[TokenSource, int]: ...


def show_batch(loader: PackedLoader, tokenizer: Tokenizer) -> list[list[ShownPiece]]:
    """The rows of the batch that `loader` would give next, which it still gives afterwards."""
    first = loader.row + loader.rank * loader.rows
    return [
        [show_piece(loader.source, piece, tokenizer) for piece in loader.row_pieces(row)]
        for row in range(first, first + loader.rows)
    ]


def show_document(shards: Shards, number: int, tokenizer: Tokenizer) -> ShownPiece:
    """A whole document."""
    return show_piece(shards, Piece(number, 0, int(shards.lengths[number])), tokenizer)


def show_piece(source: TokenSource, piece: Piece, tokenizer: Tokenizer) -> ShownPiece:
    """What `piece` of a document of `source` says, and where it comes from."""
    if piece.document == NOTHING:
        return ShownPiece(NOTHING, "", None, 0, piece.stop, piece.stop, [], [])
    number = piece.document
    while isinstance(source, Derived):
        source, number = source.beneath(number)
    assert isinstance(source, Shards), "documents come from shards"
    ids = source.document(number)[piece.start : piece.stop].tolist()
    return ShownPiece(
        number,
        source.kind(number),
        source.provenance(number),
        piece.start,
        piece.stop,
        int(source.lengths[number]),
        ids,
        segments(ids, tokenizer),
    )


def segments(ids: Sequence[int], tokenizer: Tokenizer) -> list[Segment]:
    """The text of `ids`, special tokens apart: a text can spell one without having it.

    Where a document is cut inside a character, there is U+FFFD.
    """
    special = set(tokenizer.special_tokens.values())
    return [
        Segment(tokenizer.decode(run), is_special)
        for is_special, run in itertools.groupby(ids, special.__contains__)
    ]


_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
_VISIBLE |= {0x7F: 0x2421}
_HIDDEN = (
    *range(0x80, 0xA0),
    0x061C,
    0x200E,
    0x200F,
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
)


def visible(text: str) -> str:
    """`text` with control characters, which could rule a terminal, and marks that turn the
    direction of writing replaced by signs for them."""
    return text.translate(_VISIBLE | {code: f"\\u{code:04x}" for code in _HIDDEN})
