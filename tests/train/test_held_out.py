"""Held-out figures of a run: what they are of, and that ranks change nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.evaluate.score import score_text
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.held_out import held_out_batches
from qwen2.tokens.packing import IGNORE
from qwen2.tokens.shards import Shards, write_shards
from qwen2.train.held_out import HeldOut
from qwen2.train.loop import METRICS
from qwen2.train.pretrain import PretrainRecipe, pretrain
from qwen2.train.step import Trainee

TEXTS = {"prose": ["A rose is a rose.", "Ein Bär."], "verse": ["O rose, thou art sick!"]}


@pytest.fixture
def held_out(data: Path, tmp_path: Path) -> Shards:
    coder = Tokenizer.load(data / "tokenizer")
    documents = [(kind, coder.encode(text)) for kind, each in TEXTS.items() for text in each]
    write_shards(
        tmp_path / "held-out",
        documents,
        vocab_size=coder.vocab_size,
        end_of_text=coder.end_of_text_id,
        tokenizer="bytes",
    )
    return Shards(tmp_path / "held-out")


def test_within_the_context_it_is_the_score_of_the_texts(
    data: Path, held_out: Shards, new_trainee: Callable[..., Trainee]
) -> None:
    coder, trainee = Tokenizer.load(data / "tokenizer"), new_trainee(vocab_size=272)
    found = HeldOut(held_out, coder, 64, 1, 1000).bits_per_byte(trainee.loss)
    for kind, texts in TEXTS.items():
        scores = [score_text(trainee.model, coder, text) for text in texts]
        bits = sum(score.nats for score in scores) / math.log(2)
        assert found[kind] == pytest.approx(bits / sum(len(t.encode()) for t in texts), rel=1e-5)


def test_every_token_is_a_target_once_and_ends_of_documents_are_none(held_out: Shards) -> None:
    batches = list(held_out_batches(held_out, held_out.index.end_of_text, 8, 2))
    assert all(len(batch.tokens) == 16 for batch in batches)
    targets = torch.cat([batch.targets for batch in batches])
    text = "".join(text for each in TEXTS.values() for text in each)
    assert bytes(targets[targets != IGNORE].tolist()).decode() == text


def test_of_much_text_some_of_many_documents_is_read() -> None:
    class Books:
        fingerprint = "books"
        lengths = torch.full((40,), 100).numpy()

        def document(self, number: int, /) -> Any:
            return torch.full((100,), number).numpy()

    batches = list(held_out_batches(Books(), 99, 10, 2, most=320))
    targets = torch.cat([batch.targets for batch in batches])
    counts = torch.bincount(targets[targets != IGNORE])
    assert counts.tolist() == [20] * 16


def test_a_run_measures_its_held_out_text(
    recipe: dict[str, Any], held_out: Shards, data: Path
) -> None:
    chosen = PretrainRecipe(**recipe | {"held_out": str(held_out.folder), "evaluate_every": 4})
    result = pretrain(chosen)
    lines = (chosen.out / METRICS).read_text().splitlines()
    figures = [line for line in lines if "evaluation" in line]
    assert len(figures) == 2
    assert result.model is not None
    assert all(kind in figures[0] for kind in TEXTS)


def test_shards_without_text_are_refused(data: Path, tmp_path: Path) -> None:
    coder = Tokenizer.load(data / "tokenizer")
    write_shards(
        tmp_path / "empty",
        [("nothing", [])],
        vocab_size=coder.vocab_size,
        end_of_text=coder.end_of_text_id,
        tokenizer="bytes",
    )
    with pytest.raises(UserError, match="no text in it"):
        HeldOut(Shards(tmp_path / "empty"), coder, 8, 1, 100)
