"""Token ids on disk and on their way to the model: shards, mixtures, packing, loader."""

from qwen2.tokens.loader import PackedLoader, TokenSource
from qwen2.tokens.mixture import LongMixture
from qwen2.tokens.packing import EpochLayout, PackedBatch, Piece, lay_epoch, pack, shuffled
from qwen2.tokens.remap import Remapping, most_used
from qwen2.tokens.shards import ShardIndex, Shards, tokenize_documents, write_shards
from qwen2.tokens.weighted import Subset, WeightedLoader, by_kind

__all__ = [
    "EpochLayout",
    "LongMixture",
    "PackedBatch",
    "PackedLoader",
    "Piece",
    "Remapping",
    "ShardIndex",
    "Shards",
    "Subset",
    "TokenSource",
    "WeightedLoader",
    "by_kind",
    "lay_epoch",
    "most_used",
    "pack",
    "shuffled",
    "tokenize_documents",
    "write_shards",
]
