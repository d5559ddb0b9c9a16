"""From files to documents: collected, deduplicated, split into train and held-out."""

from qwen2.corpus.collect import (
    HELD_OUT,
    SUMMARY,
    TRAIN,
    LocalConfig,
    Megabytes,
    Places,
    Tally,
    build_corpus,
    collect_local,
    this_machine,
)
from qwen2.corpus.dedup import deduplicate, text_digest
from qwen2.corpus.documents import Document, read_documents, write_documents
from qwen2.corpus.split import held_out_keys, split_key

__all__ = [
    "HELD_OUT",
    "SUMMARY",
    "TRAIN",
    "Document",
    "LocalConfig",
    "Megabytes",
    "Places",
    "Tally",
    "build_corpus",
    "collect_local",
    "deduplicate",
    "held_out_keys",
    "read_documents",
    "split_key",
    "text_digest",
    "this_machine",
    "write_documents",
]
