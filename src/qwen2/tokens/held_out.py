"""Batches of held-out documents, each token of which is predicted once."""

from __future__ import annotations

from collections.abc import Iterator

from qwen2.tokens.loader import TokenSource
from qwen2.tokens.packing import IGNORE, NOTHING, PackedBatch, Piece, pack


def held_out_batches(
    source: TokenSource, end_of_text: int, context: int, rows: int, most: int | None = None
) -> Iterator[PackedBatch]:
    """The documents in their order, in pieces of at most `context`; rows x context tokens a batch.

    The ends of documents are no targets, since they have no bytes. What a batch has no piece for
    is padding. Of more than `most` tokens the first are taken, and of each document a sixteenth of
    that, lest it be one book.
    """
    size = rows * context
    left = sum(source.lengths.tolist()) if most is None else most
    batch: list[Piece] = []
    room = size
    for number, length in enumerate(source.lengths.tolist()):
        taken = min(length if most is None else min(length, max(most // 16, context)), left)
        left -= taken
        for start in range(0, taken, context):
            stop = min(start + context, taken)
            if stop - start > room:
                yield _padded(source, batch, room, end_of_text)
                batch, room = [], size
            batch.append(Piece(number, start, stop))
            room -= stop - start
    if batch:
        yield _padded(source, batch, room, end_of_text)


def _padded(source: TokenSource, pieces: list[Piece], room: int, end_of_text: int) -> PackedBatch:
    batch = pack([*pieces, Piece(NOTHING, 0, room)] if room else pieces, source.document)
    batch.targets[batch.targets == end_of_text] = IGNORE
    return batch
