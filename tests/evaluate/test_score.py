"""Scores against transformers' loss, and windows against the whole."""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from qwen2.evaluate.compressors import compressor_bits_per_byte
from qwen2.evaluate.score import Score, score_text, token_nats
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hf_config import config_to_hf
from qwen2.tokenizer import Tokenizer

BYTES = Tokenizer.from_ranks(
    {bytes([value]): value for value in range(256)},
    {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
)
TEXT = "Fünf Wörter, and some more of them, until the window is full. " * 2


@pytest.fixture
def model(tiny: ModelConfig, generator: torch.Generator) -> Qwen2:
    model = Qwen2(tiny).eval()
    init_weights(model, generator)
    return model


def test_bits_and_perplexity_equal_transformers_loss(model: Qwen2) -> None:
    other = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**config_to_hf(model.config, "float32"))
    )
    other.load_state_dict(model.state_dict())
    ids = torch.tensor([[256, *TEXT.encode()]])
    loss = other.eval()(ids, labels=ids).loss.item()  # mean over all but the first
    score = score_text(model, BYTES, TEXT)
    assert score.tokens == score.bytes == len(TEXT.encode())
    assert score.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert score.bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-5)


@pytest.mark.parametrize("context", [2, 3, 7, 50, 127, 128, 1000])
def test_windows_score_every_token_once(model: Qwen2, context: int) -> None:
    """Each token sees what its window says, and at least half a context of it."""
    ids = [256, *TEXT.encode()]
    nats = token_nats(model, ids, context)
    assert nats.shape == (len(ids) - 1,)
    whole = token_nats(model, ids, len(ids))
    torch.testing.assert_close(nats[:context], whole[:context], atol=1e-5, rtol=1e-5)
    scored = min(context, len(ids) - 1)
    while scored < len(ids) - 1:
        start = scored - context // 2
        window = token_nats(model, ids[start : start + context + 1], context)
        fresh = window[scored - start :]
        torch.testing.assert_close(nats[scored : scored + len(fresh)], fresh, atol=1e-5, rtol=1e-5)
        scored += len(fresh)


def test_scores_add_up() -> None:
    total = Score(2.0, 3, 4) + Score(1.0, 1, 2)
    assert total == Score(3.0, 4, 6)
    assert total.bits_per_byte == pytest.approx(3 / math.log(2) / 6)
    assert math.isnan(Score().perplexity)


def test_an_empty_text_has_no_tokens(model: Qwen2) -> None:
    assert score_text(model, BYTES, "") == Score()


def test_compressors_by_their_own_tools() -> None:
    noise = torch.randint(0, 128, (4000,), generator=torch.Generator().manual_seed(0))
    text = bytes(noise.tolist()).decode()
    bits = compressor_bits_per_byte([text[:2000], text[2000:]])
    assert all(7.0 < value < 7.5 for value in bits.values())  # 7 bits of noise and a header
    assert all(value < 0.5 for value in compressor_bits_per_byte(["ab" * 4000]).values())
