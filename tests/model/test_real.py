"""The real 0.5B checkpoint gives the facts computed from it with transformers."""

from __future__ import annotations

import argparse
import difflib
import inspect
import statistics
import textwrap
from pathlib import Path

import pytest
import torch

import qwen2
from qwen2.evaluate.score import score_text
from qwen2.model.attention import PackedAttention
from qwen2.model.config import PUBLISHED
from qwen2.model.hub import save
from qwen2.model.quantise import quantise_model

pytestmark = [pytest.mark.real, pytest.mark.slow]

PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
)
TOP = {785: 23.237, 2121: 18.960, 49000: 18.959, 59604: 17.692, 40: 16.853}
ANSWER = [785, 6722, 315, 9625, 374, 12095, 13, 151645]


@torch.no_grad()
def test_logits_and_greedy_answer(real_checkpoint: Path) -> None:
    model, tokenizer = qwen2.load(real_checkpoint, dtype="fp32")
    ids = tokenizer.encode(PROMPT, parse_special=True)
    tokens = torch.tensor(ids + ANSWER[:-1])
    attention = PackedAttention([len(tokens)])
    steps = torch.arange(len(ids) - 1, len(tokens))  # those that predict the answer
    logits = model(tokens, torch.arange(len(tokens)), attention, steps)
    values, top = logits[0].topk(5)
    assert top.tolist() == list(TOP)
    torch.testing.assert_close(values, torch.tensor(list(TOP.values())), atol=1e-3, rtol=0)
    assert logits.argmax(-1).tolist() == ANSWER
    assert tokenizer.decode(ANSWER, skip_special=True) == "The capital of France is Paris."


def test_the_shape_is_the_published_one(real_checkpoint: Path) -> None:
    model = qwen2.load(real_checkpoint)[0]
    published = PUBLISHED["0.5b"]
    # The file carries a head of its own, quantised apart from the embedding.
    assert not model.config.tie_word_embeddings
    assert model.config.num_non_embedding_parameters() == published.num_non_embedding_parameters()
    assert model.config.vocab_size == published.vocab_size
    assert model.dtype == torch.bfloat16


def shipped_text() -> str:
    """40 kB of Python's own: of one file alone the loss moves by 2 % by chance."""
    modules = (textwrap, statistics, argparse, difflib)
    return "\n".join(inspect.getsource(module)[:10_000] for module in modules)


@torch.no_grad()
def test_int8_loses_less_than_a_hundredth_and_says_the_same(real_checkpoint: Path) -> None:
    """Bits per byte of text that ships with Python, and the answer above."""
    model, tokenizer = qwen2.load(real_checkpoint)
    quantised = quantise_model(model, "int8")
    true = score_text(model, tokenizer, shipped_text()).bits_per_byte
    found = score_text(quantised, tokenizer, shipped_text()).bits_per_byte
    assert abs(found / true - 1) < 0.01
    ids = tokenizer.encode(PROMPT, parse_special=True)
    tokens = torch.tensor(ids + ANSWER[:-1])
    steps = torch.arange(len(ids) - 1, len(tokens))
    positions, attention = torch.arange(len(tokens)), quantised.packed([len(tokens)])
    assert quantised(tokens, positions, attention, steps).argmax(-1).tolist() == ANSWER


@torch.no_grad()
def test_int4_says_the_same(real_checkpoint: Path, tmp_path: Path) -> None:
    """Without a calibration, which takes minutes; through a file."""
    model, tokenizer = qwen2.load(real_checkpoint, quantize="int4")
    save(model, tokenizer, tmp_path / "int4")
    model = qwen2.load(tmp_path / "int4", inference=True)[0]
    ids = tokenizer.encode(PROMPT, parse_special=True)
    tokens = torch.tensor(ids + ANSWER[:-1])
    steps = torch.arange(len(ids) - 1, len(tokens))
    logits = model(tokens, torch.arange(len(tokens)), model.packed([len(tokens)]), steps)
    assert logits.argmax(-1).tolist() == ANSWER
