"""Token ids on disk and on their way to the model: shards, mixture, packing, loader."""

from qwen2.tokens.loader import PackedLoader, TokenSource
from qwen2.tokens.mixture import LongMixture
from qwen2.tokens.packing import EpochLayout, PackedBatch, Piece, lay_epoch, pack, shuffled
from qwen2.tokens.shards import ShardIndex, Shards, tokenize_documents, write_shards

__all__ = [
    "EpochLayout",
    "LongMixture",
    "PackedBatch",
    "PackedLoader",
    "Piece",
    "ShardIndex",
    "Shards",
    "TokenSource",
    "lay_epoch",
    "pack",
    "shuffled",
    "tokenize_documents",
    "write_shards",
]
