"""A tiny model, a text with something to learn, and a trainee, for the tests of training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.loader import PackedLoader
from qwen2.tokens.shards import write_shards
from qwen2.train.optimizers import AdamWConfig, MuonConfig
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.precision import MasterWeights
from qwen2.train.step import Trainee

VOCABULARY = 61
TEXT = "To see a world in a grain of sand and a heaven in a wild flower. "


class Documents:
    """Token ids in memory: arithmetic sequences modulo the vocabulary, of mixed lengths."""

    fingerprint = "documents of the tests"

    def __init__(self, count: int = 40) -> None:
        random = np.random.default_rng(0)
        lengths = random.integers(3, 50, count)
        starts = random.integers(0, VOCABULARY, count)
        self.documents = [
            (start + 3 * np.arange(length)) % VOCABULARY
            for start, length in zip(starts, lengths, strict=True)
        ]
        self.lengths: NDArray[np.int64] = lengths.astype(np.int64)

    def document(self, number: int, /) -> NDArray[Any]:
        return self.documents[number]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums in one order, and room for whoever else is computing."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def small() -> ModelConfig:
    """A model of two layers."""
    return ModelConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )


@pytest.fixture(scope="session")
def new_loader() -> Callable[..., PackedLoader]:
    """Makes loaders of 2 x 16 tokens over the same documents."""
    return lambda rows=2: PackedLoader(Documents(), context=16, rows=rows, seed=3)


@pytest.fixture(scope="session")
def new_trainee(small: ModelConfig) -> Callable[..., Trainee]:
    """Makes trainees that all start from the same weights."""

    def make(
        dtype: torch.dtype = torch.float32,
        optimizer: AdamWConfig | MuonConfig | None = None,
        **changes: Any,
    ) -> Trainee:
        model = Qwen2(small.model_copy(update=changes))
        init_weights(model, torch.Generator().manual_seed(0))
        weights = MasterWeights(model, dtype)
        chosen = optimizer or AdamWConfig(lr=1e-2)
        return Trainee(PackedLoss(model), weights, chosen.build(weights.masters))

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tokenizer of bytes and shards made by it."""
    place = tmp_path_factory.mktemp("data")
    ranks = {bytes([i]): i for i in range(256)}
    control = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    tokenizer = Tokenizer.from_ranks(ranks, control)
    tokenizer.save(place / "tokenizer")
    documents = [("prose", tokenizer.encode(TEXT * n)) for n in (1, 2, 3, 4)]
    write_shards(
        place / "shards",
        documents,
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text_id,
        tokenizer="bytes",
    )
    return place


@pytest.fixture
def recipe(data: Path, tmp_path: Path) -> dict[str, Any]:
    """A recipe of 8 steps, as YAML has it."""
    return {
        "stage": "pretrain",
        "model": {
            "vocab_size": 272,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
        "data": str(data / "shards"),
        "tokenizer": str(data / "tokenizer"),
        "out": str(tmp_path / "out"),
        "context": 32,
        "rows": 2,
        "steps": 8,
        "optimizer": {"lr": 0.01},
        "schedule": {"kind": "wsd", "warmup": 2, "decay": 3},
        "checkpoint_every": 3,
        "threads": 1,
    }
