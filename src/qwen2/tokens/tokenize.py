"""Documents to token ids, on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from qwen2.corpus.documents import Document, in_batches
from qwen2.tokens.shard_file import Encoded, Ids, Origin

BATCH_BYTES = 1 << 22  # of text handed to the tokenizer at once: enough to keep all cores busy


def tokenize_documents(
    documents: Iterable[Document],
    encode_batch: Callable[[list[str]], Sequence[Ids]],
    place: Callable[[Document], tuple[str, int]] | None = None,
) -> Iterator[Encoded]:
    """The token ids of each document, in order; `encode_batch` is called on a few MB at a time.

    Args:
        encode_batch: such as `Tokenizer.encode_arrays`. It must not read control tokens out of
            text: a document that speaks of `<|endoftext|>` does not end there.
        place: the part of the corpus run that a document is in, and its row there.
    """
    for batch in in_batches(documents, BATCH_BYTES):
        encoded = encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            part, row = place(document) if place else (None, None)
            origin = Origin(document.id, document.source, document.language, part, row)
            yield Encoded(document.kind, ids, origin)
