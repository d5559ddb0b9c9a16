"""Readings against evaluate/score.py and a plain pass, whatever else is read at the same time."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from qwen2.corpus.quality.config import Extent
from qwen2.evaluate.score import score_text
from qwen2.model.decoder import Qwen2
from qwen2.pipeline.quality import reading
from qwen2.pipeline.quality.reading import Reader
from qwen2.tokenizer import Tokenizer

TEXTS = ["Fünf Wörter, and some more of them.", "", "x", "short", "long " * 40]


@pytest.mark.parametrize("context", [4, 7, 50, 4096])
def test_the_figures_are_those_of_score(model: Qwen2, coder: Tokenizer, context: int) -> None:
    found = Reader(model, coder, Extent(tokens=None, context=context)).read(TEXTS)
    for place, text in enumerate(TEXTS):
        score = score_text(model, coder, text, context)
        assert (found.tokens[place], found.bytes[place]) == (score.tokens, score.bytes)
        assert found.nats[place] == pytest.approx(score.nats, rel=1e-5)
        if text:
            assert found.perplexity[place] == pytest.approx(score.perplexity, rel=1e-5)
            assert found.bits_per_byte[place] == pytest.approx(score.bits_per_byte, rel=1e-5)
    assert math.isnan(found.perplexity[1])
    assert math.isnan(found.bits_per_byte[1])


@torch.inference_mode()
def test_the_mean_is_of_the_contents_hidden_states(model: Qwen2, coder: Tokenizer) -> None:
    found = Reader(model, coder, Extent(tokens=None)).read(TEXTS, loss=False)
    assert np.isnan(found.nats).all()
    for place, text in enumerate(TEXTS):
        ids = torch.tensor([256, *text.encode()])
        hidden = model.model(ids, torch.arange(len(ids)), model.packed([len(ids)]))
        expected = hidden[1:].mean(0).numpy() if text else np.zeros(hidden.shape[1])
        np.testing.assert_allclose(found.pooled[place], expected, atol=1e-5)


def test_only_the_first_tokens_are_read(model: Qwen2, coder: Tokenizer) -> None:
    found = Reader(model, coder, Extent(tokens=9)).read(["Fünf Wörter", "kurz"])
    whole = Reader(model, coder, Extent(tokens=None)).read(["Fünf Wör"[:8], "kurz"])
    assert found.tokens.tolist() == [9, 4]
    assert found.bytes.tolist() == [9, 4]
    assert found.nats[1] == pytest.approx(whole.nats[1], rel=1e-5)
    exact = Reader(model, coder, Extent(tokens=None)).read(["Fünf Wö"])
    assert exact.tokens[0] == 9
    assert found.nats[0] == pytest.approx(exact.nats[0], rel=1e-5)


def test_a_pass_is_bounded_and_changes_nothing(
    model: Qwen2, coder: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = ["text " * n for n in range(1, 30)]
    reader = Reader(model, coder, Extent(tokens=None, context=64))
    together = reader.read(texts)
    monkeypatch.setattr(reading, "BUDGET", 100)
    largest: list[int] = []
    packed = model.packed
    monkeypatch.setattr(
        model, "packed", lambda lengths: (largest.append(sum(lengths)), packed(lengths))[1]
    )
    apart = reader.read(texts)
    assert len(largest) > 10
    assert max(largest) <= 100
    np.testing.assert_allclose(apart.nats, together.nats, rtol=1e-5)
    np.testing.assert_allclose(apart.pooled, together.pooled, atol=1e-5)


def test_no_texts_are_no_readings(model: Qwen2, coder: Tokenizer) -> None:
    assert Reader(model, coder, Extent()).read([]).pooled.shape == (0, 32)
