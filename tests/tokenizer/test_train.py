"""Training: exact size, deterministic, and the same merges as the library's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.train import train_bpe
from qwen2.tokenizer.vocabulary import merges_of, unspell


@pytest.fixture(scope="module")
def trained(documents: list[str]) -> Tokenizer:
    return train_bpe(iter(documents[::20]), 3_000)


def test_has_the_asked_size_and_the_form_of_qwen2(trained: Tokenizer, qwen: Tokenizer) -> None:
    assert trained.vocab_size == 3_000
    assert trained.special_tokens == {
        "<|endoftext|>": 2997,
        "<|im_start|>": 2998,
        "<|im_end|>": 2999,
    }
    assert len(trained.merges) == 3_000 - 3 - 256
    assert trained.chat_template == qwen.chat_template


def test_same_texts_give_the_same_vocabulary(trained: Tokenizer, documents: list[str]) -> None:
    assert train_bpe(iter(documents[::20]), 3_000) == trained


def test_compresses_and_comes_back(trained: Tokenizer, documents: list[str]) -> None:
    text = "\n".join(documents[::500])
    ids = trained.encode(text)
    assert len(ids) < len(text.encode()) / 2
    assert "".join(map(trained.stream().push, ids)) == trained.decode(ids)


def test_saved_gives_the_same_ids_elsewhere(
    trained: Tokenizer, documents: list[str], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    trained.save(tmp_path)
    assert Tokenizer.load(tmp_path) == trained
    some = documents[1::40]
    ids = trained.encode_batch(some)
    assert AutoTokenizer.from_pretrained(tmp_path)(some)["input_ids"] == ids


@settings(max_examples=100)
@given(
    texts=st.lists(st.text("abc", min_size=3, max_size=60), min_size=1, max_size=8),
    merges=st.integers(1, 40),
)
def test_ranks_alone_give_the_trainers_merges(texts: list[str], merges: int) -> None:
    """What recovering merges rests on, where tokens can be made in many ways."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=alphabet, show_progress=False
    )
    library.train_from_iterator(iter(texts), trainer)
    model: dict[str, Any] = json.loads(library.to_str())["model"]
    ranks = {unspell(token): id_ for token, id_ in model["vocab"].items()}
    assert merges_of(ranks) == [tuple(map(unspell, merge)) for merge in model["merges"]]


def test_smallest_vocabulary_is_the_bytes() -> None:
    tokenizer = train_bpe(iter(["aaaa"]), 259)
    assert tokenizer.merges == []
    assert tokenizer.decode(tokenizer.encode("né")) == "né"


@pytest.mark.parametrize(
    ("size", "message"),
    [(258, "size 258: 259 at least"), (1_000, "texts have merges for only 270 tokens")],
)
def test_impossible_sizes(size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        train_bpe(iter(["some few words"]), size)
