"""Words by hand, their hashes, and that a batch changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.corpus.filters import stop_words
from qwen2.corpus.filters import words as w

# Any Unicode, lone surrogates too; and what the rules of words look for, so that it does come up.
ANY = st.text(st.characters(exclude_categories=()), max_size=60)
SIGNS = st.text("ab.B1'’snt-,:/=()\"… \n我のก้", max_size=60)
TEXTS = ANY | SIGNS


def cut(text: str) -> list[str]:
    words = w.split([text])
    return [text[a:b] for a, b in zip(words.starts, words.ends, strict=True)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        (" \n\u3000", []),
        ("Hello, world!", ["Hello", ",", "world", "!"]),
        ("(You) can't, she'll.", ["(", "You", ")", "ca", "n't", ",", "she", "'ll", "."]),
        ("a well-known fact...", ["a", "well", "-", "known", "fact", "..."]),
        ("U.S. e.g. x", ["U.S.", "e.g.", "x"]),
        ("$10 or 10%", ["$", "10", "or", "10", "%"]),
        ("1+2 1,000 3.5 a,b", ["1", "+", "2", "1,000", "3.5", "a", ",", "b"]),
        ("http://a.b/c:d=e, x=y", ["http://a.b/c:d=e", ",", "x", "=", "y"]),
        ("«Oui», l'ami", ["«", "Oui", "»", ",", "l'ami"]),
        ("北京。Hi你", ["北", "京", "。", "Hi", "你"]),
        ("ที่นี้ ok", ["ที่", "นี้", "ok"]),
        ("នៅ\u200bផ្ទះ", ["នៅ\u200b", "ផ្", "ទះ"]),
        ("안녕 세상", ["안녕", "세상"]),
        ("नमस्ते दुनिया।", ["नमस्ते", "दुनिया", "।"]),
    ],
)  # fmt: skip
def test_cuts_words(text: str, expected: list[str]) -> None:
    assert cut(text) == expected


@given(TEXTS)
def test_words_cover_all_but_white_space(text: str) -> None:
    found = cut(text)
    assert all(found)
    assert "".join(found) == "".join(text.split())


@given(st.lists(TEXTS, max_size=6))
def test_a_batch_changes_nothing(texts: list[str]) -> None:
    together = w.split(texts)
    assert len(together.firsts) == len(texts) + 1
    for index, text in enumerate(texts):
        alone = w.split([text])
        part = slice(together.firsts[index], together.firsts[index + 1])
        assert (together.starts[part] - together.offsets[index] == alone.starts).all()
        assert (together.lengths[part] == alone.lengths).all()
        assert (together.hashes[part] == alone.hashes).all()
        assert (together.bits[part] == alone.bits).all()
        assert together.scales[index] == alone.scales[0]
        assert together.per_text(together.weights)[index] == alone.per_text(alone.weights)[0]


@given(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=40))
def test_equal_words_have_equal_hashes_and_others_others(words: list[str]) -> None:
    hashes = w.split([" ".join(words)]).hashes.tolist()
    assert len(set(hashes)) == len(set(words))
    assert dict(zip(words, hashes, strict=True)) == {word: w.hash_of(word) for word in words}


def test_weights_and_scales_follow_the_script() -> None:
    words = w.split(["北京 is", "ที่นี้", "word", ""])
    assert words.weights.tolist() == pytest.approx([0.5, 0.5, 1, 1 / 3, 1 / 3, 1])
    assert words.scales.tolist() == [2, 3, 1, 1]


def test_batches_hold_every_text_once() -> None:
    texts = ["a" * n for n in (5, 0, 30, 2, 2, 9)]
    slices = list(w.batches(texts, 10))
    assert [text for part in slices for text in texts[part]] == texts
    assert [sum(map(len, texts[part])) for part in slices] == [5, 30, 4, 9]


def test_sums_of_segments_may_be_empty() -> None:
    values, bounds = np.array([1, 2, 3]), np.array([0, 0, 2, 2, 3, 3])
    assert w.segment_sums(values, bounds).tolist() == [0, 3, 0, 3, 0]


def test_stop_words_are_single_words() -> None:
    hashes, own = stop_words.hashes()
    assert (np.diff(hashes.astype(object)) > 0).all()
    the = int(np.searchsorted(hashes, np.uint64(w.hash_of("the"))))
    assert the in own["en"]
    assert the not in own["de"]
    assert len(own["en"]) == 8
