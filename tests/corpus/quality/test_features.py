"""Hashed words against a plain cutter of words, and the same whatever texts are beside."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen2.corpus.quality.features import feature_batches, features

TEXTS = st.lists(st.text(st.one_of(st.characters(), st.sampled_from("ab. \nьệ漢ক")), max_size=40))
BITS = 28


def plain_words(text: str) -> list[str]:
    """The rules of the module, a character at a time."""
    words: list[str] = []
    joins = False
    for character in text:
        code = ord(character)
        is_letter = (
            (code < 128 and character.isalnum()) or 0xC0 <= code < 0x800 or 0x1E00 <= code < 0x2000
        )
        if character in " \t\r\0":
            joins = False
        elif is_letter and joins:
            words[-1] += character
        else:
            words.append(character)
            joins = is_letter
    return words


@given(TEXTS)
@example(["Việt Nam, 漢字", "", "\u1e00\u0fff", "x"])
@example(["", " ", ""])
def test_words_are_those_of_the_plain_cutter(texts: list[str]) -> None:
    found = features(texts, BITS)
    assert np.diff(found.tokens).tolist() == [len(plain_words(text)) for text in texts]
    assert np.diff(found.pairs).tolist() == [max(len(plain_words(t)) - 1, 0) for t in texts]
    slots: dict[int, str] = {}
    words = [word for text in texts for word in plain_words(text)]
    for slot, word in zip(found.slots[: found.tokens[-1]].tolist(), words, strict=True):
        assert slots.setdefault(slot, word) == word  # equal slots, equal words


@given(TEXTS.filter(bool), st.integers(0, 100))
def test_a_text_has_the_same_features_beside_any_others(texts: list[str], which: int) -> None:
    index = which % len(texts)
    together = features(texts, BITS).of_text(index)
    assert together.tolist() == features([texts[index]], BITS).slots.tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("ab ba", "ba ab"),
        ("a b", "ab"),
        ("Word", "word"),
        ("漢字", "字漢"),
        ("a", "aa"),
        ("x\ny", "x y"),
    ],
)
def test_what_differs_has_other_features(one: str, other: str) -> None:
    mine, theirs = (set(features([text], BITS).slots.tolist()) for text in (one, other))
    assert mine != theirs


def test_pairs_stay_within_their_text() -> None:
    apart = features(["one two", "three"], BITS)
    assert apart.pairs.tolist() == [0, 1, 1]
    assert apart.counts.tolist() == [3, 1]


def test_batches_cover_all_texts_in_order() -> None:
    texts = [f"text {i} " * 3000 for i in range(9)]
    covered = [part for part, _ in feature_batches(texts, BITS)]
    assert len(covered) > 1
    assert [i for part in covered for i in range(part.start, part.stop)] == list(range(9))
