"""Repetition by hand, against a slow reading of the definition, and in any batch."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.corpus.filters import repetition
from qwen2.corpus.filters import words as w

FEW = st.lists(st.sampled_from(["a", "bb", "c", "d\n", "e"]), max_size=70).map(" ".join)
HAN = st.text("我你他 的", max_size=60)
ANY = st.text(st.characters(exclude_categories=()), max_size=60)


def measured(texts: list[str]) -> dict[str, list[float]]:
    numbers = repetition.measure(texts, w.split(texts))
    assert tuple(numbers) == repetition.STATISTICS
    return {name: values.tolist() for name, values in numbers.items()}


def slow(text: str) -> dict[str, float]:
    """As the module's docstring defines it, word by word."""
    cut = w.split([text])
    words = [text[a:b] for a, b in zip(cut.starts, cut.ends, strict=True)]
    scale = int(cut.scales[0])
    space = " " if scale == 1 else ""
    numbers = {}
    for rule in repetition.TOP_GRAMS:
        n = scale * rule
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        top = Counter(grams).most_common(1)
        numbers[f"top_{rule}_gram"] = sum(len(space.join(g)) * c for g, c in top) / max(
            len(text), 1
        )
    for rule in repetition.DUPLICATE_GRAMS:
        n = scale * rule
        met, place, characters = set(), 0, 0
        while place < len(words) - n + 1:
            gram = tuple(words[place : place + n])
            if gram in met:
                characters += sum(map(len, gram))
                place += n
            else:
                met.add(gram)
                place += 1
        numbers[f"duplicate_{rule}_grams"] = characters / max(len(text), 1)
    parts = {"paragraph": re.split(r"\n{2,}", text.strip()), "line": re.split(r"\n+", text)}
    for name, found in parts.items():
        again = [part for index, part in enumerate(found) if part in found[:index]]
        numbers[f"duplicate_{name}s"] = len(again) / len(found)
        numbers[f"duplicate_{name}_characters"] = sum(map(len, again)) / max(len(text), 1)
    return numbers


@settings(max_examples=200)
@given(st.lists(FEW | HAN | ANY, min_size=1, max_size=5))
def test_equals_the_definition_in_any_batch(texts: list[str]) -> None:
    numbers = measured(texts)
    for index, text in enumerate(texts):
        expected = slow(text)
        for name in repetition.STATISTICS:
            assert numbers[name][index] == pytest.approx(expected[name], abs=1e-12), name


@given(ANY | FEW | HAN)
def test_shares_are_shares(text: str) -> None:
    for name, (value,) in measured([text]).items():
        assert np.isfinite(value)
        assert value >= 0
        # Frequent n-grams overlap, and the spaces counted inside them need not be there.
        assert value <= 1 or name.startswith("top"), name


def test_by_hand() -> None:
    # 15 characters of words and 9 spaces; "a b" and "b c" twice, "a b" first: 2 x 3 characters.
    (text,) = texts = ["a b c d eeee a b c d ffff"]
    numbers = measured(texts)
    assert len(text) == 25
    assert numbers["top_2_gram"] == [2 * 3 / 25]
    assert numbers["top_3_gram"] == [2 * 5 / 25]
    assert numbers["top_4_gram"] == [2 * 7 / 25]
    assert numbers["duplicate_5_grams"] == [0.0]
    assert measured(["a b c d e a b c d e"])["duplicate_5_grams"] == [5 / 19]
    lines = measured(["one\ntwo\none\n\none"])
    assert lines["duplicate_lines"] == [2 / 4]
    assert lines["duplicate_line_characters"] == [6 / 16]
    assert lines["duplicate_paragraphs"] == [0.0]


def test_a_step_over_hides_what_lies_inside() -> None:
    # bcdef occurs first inside the second abcde, which is stepped over: so its next is the first.
    text = "a b c d e x a b c d e f y b c d e f"
    assert measured([text])["duplicate_5_grams"] == [5 / len(text)]


def test_letters_of_han_count_in_pairs() -> None:
    ten = "天地玄黄宇宙洪荒日月"
    (numbers,) = (measured([ten + "。" + ten]),)
    assert numbers["duplicate_5_grams"] == [10 / 21]
    assert numbers["duplicate_6_grams"] == [0.0]
    assert numbers["top_2_gram"] == [2 * 4 / 21]


def test_no_texts() -> None:
    assert all(values == [] for values in measured([]).values())
