"""From files to documents: read, deduplicated, decontaminated, split."""

from qwen2.corpus.decontaminate import Decontaminator, EvalItem, Hit, LcsRule, NgramOverlap
from qwen2.corpus.dedup import deduplicate, text_digest
from qwen2.corpus.documents import Document, read_documents, write_documents
from qwen2.corpus.machine import Places, local_documents, this_machine
from qwen2.corpus.minhash import MinHash
from qwen2.corpus.near_duplicates import dropped_rows, find_duplicates, without
from qwen2.corpus.paragraphs import (
    ParagraphRule,
    find_repeated,
    without_repeated,
    write_paragraphs,
)
from qwen2.corpus.sketches import write_sketches
from qwen2.corpus.split import HeldOut, choose_held_out, split_key

__all__ = [
    "Decontaminator",
    "Document",
    "EvalItem",
    "HeldOut",
    "Hit",
    "LcsRule",
    "MinHash",
    "NgramOverlap",
    "ParagraphRule",
    "Places",
    "choose_held_out",
    "deduplicate",
    "dropped_rows",
    "find_duplicates",
    "find_repeated",
    "local_documents",
    "read_documents",
    "split_key",
    "text_digest",
    "this_machine",
    "without",
    "without_repeated",
    "write_documents",
    "write_paragraphs",
    "write_sketches",
]
