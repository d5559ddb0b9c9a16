"""Token ids on disk and on their way to the model: shards, mixtures, packing, loader."""

from qwen2.tokens.best_fit import BestFitPlan
from qwen2.tokens.loader import PackedLoader, Packing, TokenSource
from qwen2.tokens.mixture import LongMixture
from qwen2.tokens.packing import EpochLayout, PackedBatch, Piece, lay_epoch, pack, shuffled
from qwen2.tokens.remap import Remapping, most_used
from qwen2.tokens.shard_file import Encoded, Origin, write_shard
from qwen2.tokens.shard_index import ShardIndex, index_shards
from qwen2.tokens.shards import Shards, write_shards
from qwen2.tokens.tokenize import tokenize_documents
from qwen2.tokens.weighted import Subset, WeightedLoader, by_kind

__all__ = [
    "BestFitPlan",
    "Encoded",
    "EpochLayout",
    "LongMixture",
    "Origin",
    "PackedBatch",
    "PackedLoader",
    "Packing",
    "Piece",
    "Remapping",
    "ShardIndex",
    "Shards",
    "Subset",
    "TokenSource",
    "WeightedLoader",
    "by_kind",
    "index_shards",
    "lay_epoch",
    "most_used",
    "pack",
    "shuffled",
    "tokenize_documents",
    "write_shard",
    "write_shards",
]
