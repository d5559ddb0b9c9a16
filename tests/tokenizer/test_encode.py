"""Text to ids: the report's facts, and equality with tiktoken and Hugging Face."""

from __future__ import annotations

import unicodedata
from typing import Any

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.tokenizer import PRE_TOKENS

# Any code points but surrogates, and the ones that the expression or NFC treats on its own.
AWKWARD = st.sampled_from(
    [
        *("\u0301", "\u0338", "\u3099", "\u1161", "\uac00", "e", "が", "ſ", "\u212a", "'S", "'ll"),
        *(" ", "  ", "\n", "\r\n", "\t", "\x0b", "\x1c", "\x85", "\xa0", "\u3000", "1", "½", "𝟙"),
        *(">", "🏳️‍🌈", "<|im_end|>", "<|im_", "<|endoftext|>"),
    ]
)
UNICODE = st.lists(st.text(max_size=8) | AWKWARD, max_size=20).map("".join)


def test_facts(qwen: Tokenizer) -> None:
    assert len(qwen.ranks) == 151_643
    assert qwen.special_tokens == {
        "<|endoftext|>": 151643,
        "<|im_start|>": 151644,
        "<|im_end|>": 151645,
    }
    assert qwen.vocab_size == 151_646
    assert (qwen.eos_id, qwen.pad_id, qwen.end_of_text_id) == (151643, 151643, 151643)
    assert (qwen.im_start_id, qwen.im_end_id) == (151644, 151645)
    assert qwen.stop_ids == {151643}
    assert qwen.encode("The capital of France is Paris.") == [785, 6722, 315, 9625, 374, 12095, 13]
    assert qwen.encode("") == []


def test_composes_characters_first(qwen: Tokenizer, tiktoken_oracle: tiktoken.Encoding) -> None:
    assert tiktoken_oracle.encode_ordinary("e\u0301") == [68, 53839]
    assert qwen.encode("e\u0301") == qwen.encode("é") == [963]


def test_instruct_checkpoints_stop_at_both(extended: Tokenizer) -> None:
    assert extended.eos_id == 151645
    assert extended.stop_ids == {151643, 151645}


def test_special_tokens_are_text_unless_asked(qwen: Tokenizer, huggingface: Any) -> None:
    text = "a<|im_end|>\u0338<|im_start|><|im_|>b"
    plain, parsed = qwen.encode(text), qwen.encode(text, parse_special=True)
    assert max(plain) < 151_643
    assert qwen.decode(plain) == unicodedata.normalize("NFC", text)
    assert parsed == huggingface(text)["input_ids"]
    assert [id_ for id_ in parsed if id_ >= 151_643] == [151645, 151644]
    assert qwen.encode_batch([text, text], parse_special=True) == [parsed, parsed]


def test_equals_tiktoken_and_huggingface_on_real_documents(
    qwen: Tokenizer,
    tiktoken_oracle: tiktoken.Encoding,
    huggingface: Any,
    documents: list[str],
) -> None:
    assert len(documents) >= 5_000
    composed = [unicodedata.normalize("NFC", text) for text in documents]
    assert sum(map(str.__ne__, composed, documents)) > 10
    ours = qwen.encode_batch(documents)
    assert ours == tiktoken_oracle.encode_ordinary_batch(composed)
    # "<|im_end|>" stands in no document, so transformers' parsing of it changes nothing.
    assert ours == huggingface(documents)["input_ids"]
    assert [qwen.decode(ids) for ids in ours] == composed
    assert huggingface.batch_decode(ours[::50]) == composed[::50]


@settings(max_examples=300)
@given(text=UNICODE)
def test_equals_tiktoken_and_huggingface_on_any_text(
    qwen: Tokenizer, tiktoken_oracle: tiktoken.Encoding, huggingface: Any, text: str
) -> None:
    composed = unicodedata.normalize("NFC", text)
    ids = qwen.encode(text)
    assert ids == tiktoken_oracle.encode_ordinary(composed)
    assert qwen.encode(text, parse_special=True) == huggingface(text)["input_ids"]
    assert qwen.decode(ids) == composed


@settings(max_examples=100)
@given(texts=st.lists(UNICODE, max_size=30), threads=st.integers(1, 4))
def test_batches_equal_single_texts(qwen: Tokenizer, texts: list[str], threads: int) -> None:
    expected = [qwen.encode(text) for text in texts]
    assert qwen.encode_batch(texts, threads=threads) == expected
    arrays = qwen.encode_arrays(texts, threads=threads)
    assert [ids.tolist() for ids in arrays] == expected
    assert all(ids.dtype == np.uint32 for ids in arrays)


@pytest.mark.parametrize("special", ["", "<|endoftext|>"], ids=["plain", "with the separator"])
def test_large_batches_keep_their_order(qwen: Tokenizer, special: str) -> None:
    """Enough text for many shares, a text of several, and the token that joins them as text."""
    texts = [f"e\u0301 {i} {special}" * (20_000 if i == 3 else i % 300) for i in range(1_000)]
    expected = [qwen.encode(text) for text in texts]
    for threads in (1, 3, None):
        assert qwen.encode_batch(iter(texts), threads=threads) == expected
        arrays = qwen.encode_arrays(iter(texts), threads=threads)
        assert [ids.tolist() for ids in arrays] == expected


def test_surrogates(qwen: Tokenizer) -> None:
    assert qwen.encode("a\ud800b\udc00") == qwen.encode("a\ufffdb\ufffd")
    assert qwen.encode("\ud83d\ude00") == qwen.encode("😀")
    # A musical note that NFC takes apart, written as a pair of surrogates.
    assert qwen.encode("\ud834\udd5e") == qwen.encode("\U0001d15e")


RUNS = ["a", "é", "漢", "1", "!", "\n", " ", "\t", "\u3000", " \n", "ab", "\u0301", "🙂"]


@pytest.mark.parametrize("unit", RUNS, ids=ascii)
def test_long_runs(qwen: Tokenizer, unit: str) -> None:
    """tiktoken's engine overflows its stack at a million blanks; ours must not, nor be slow."""
    run = unit * (1_200_000 // len(unit))
    for text in (run, f"x{run}y", f"!\n{run} .") if unit.isspace() else (f"x{run} y",):
        assert qwen.decode(qwen.encode(text)) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("before", ["", "x", "!\n", "\n \n"], ids=ascii)
@pytest.mark.parametrize("after", ["", "x", " x", "1", ".", "\n", "\n  y", "\ty"], ids=ascii)
def test_long_blanks_are_cut_as_the_expression_cuts(
    qwen: Tokenizer,
    tiktoken_oracle: tiktoken.Encoding,
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    after: str,
) -> None:
    for module in ("tokenizer", "long_runs"):
        monkeypatch.setattr(f"qwen2.tokenizer.{module}.LONG_RUN", 100)
    for blanks in (" " * 300, " " * 99, "\t" * 100, "\u3000" * 150, " " * 120 + "\n" + " " * 130):
        text = f"{before}{blanks}{after}z{blanks}{after}"
        assert qwen.encode(text) == tiktoken_oracle.encode_ordinary(text)


def test_many_combining_marks_are_no_trap(qwen: Tokenizer) -> None:
    """Quadratic in Python's normalisation: this would take over ten minutes."""
    text = "e" + "\u0301\u0327" * 500_000
    assert qwen.decode(qwen.encode(text)) == "\u0229" + "\u0327" * 499_999 + "\u0301" * 500_000


def test_the_expression_is_the_published_one(huggingface: Any) -> None:
    import transformers.models.qwen2.tokenization_qwen2 as published

    assert published.PRETOKENIZE_REGEX == PRE_TOKENS
