import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.corpus import shingles
from qwen2.corpus.shingles import word_hashes

# Spaces, accents in both forms, format characters, scripts with and without spaces, vowel signs.
CHARACTERS = "aB1 \n.,_éE\u0301\u00ad\u200d中文かガผู้กิकйЙ한ｂ\ufe0fß\x00𠀀"
TEXTS = st.lists(st.text(CHARACTERS, max_size=12), max_size=8)


def words(text: str) -> list[str]:
    """The rule of the module's docstring, one character after the other."""
    found: list[str] = []
    inside = ""  # kind of word that the next character may continue
    for character in text:
        major = unicodedata.category(character)
        if major == "Cf" or character == "\ufe0f" or unicodedata.combining(character):
            continue
        unspaced = character in "中文かガผู้กิ𠀀"
        if unicodedata.category(character)[0] == "M":
            if unspaced and inside == "alone":
                found[-1] += character
            else:
                found.append(character)
            inside = "alone"
        elif major[0] in "LN":
            base = unicodedata.normalize("NFKD", character)[0].casefold()
            if unspaced or inside != "word":
                found.append("")
            found[-1] += character if len(base) > 1 else base
            inside = "alone" if unspaced else "word"
        else:
            inside = ""
    return found


@given(TEXTS)
def test_words_are_those_of_the_rule(texts: list[str]) -> None:
    hashes, counts = word_hashes(texts)
    expected = [words(text) for text in texts]
    assert counts.tolist() == [len(found) for found in expected]
    flat = [word for found in expected for word in found]
    assert len(set(hashes.tolist())) == len(set(flat))
    assert len(set(zip(hashes.tolist(), flat, strict=True))) == len(set(flat))


@given(TEXTS, st.integers(2, 6))
def test_a_text_has_the_same_hashes_alone_in_any_batch_and_in_small_blocks(
    texts: list[str], block: int
) -> None:
    together, counts = word_hashes(texts)
    alone = [word_hashes([text]) for text in texts]
    assert together.tolist() == [h for hashes, _ in alone for h in hashes.tolist()]
    assert counts.tolist() == [int(count[0]) for _, count in alone]

    spaced = " ".join(texts)  # no word is longer than 12
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shingles, "BLOCK", 14 + block)
        pieces, count = word_hashes([spaced, *texts])
    whole, whole_count = word_hashes([spaced])
    assert pieces.tolist() == whole.tolist() + together.tolist()
    assert count.tolist() == [*whole_count.tolist(), *counts.tolist()]


@pytest.mark.parametrize(
    ("one", "other", "number"),
    [
        ("The  cat, SAT.", "the cat sat", 3),
        ("café naïve", "cafe\u0301 nai\u0308ve", 2),
        ("中文字", "中 文 字", 3),
        ("がぎ", "か\u3099き\u3099", 2),
        ("ﬂow １２", "ﬂow 12", 2),
        ("soft\u00adhyphen", "softhyphen", 1),
        ("हिन्दी भाषा", "हिन्दी, भाषा", 2),
        ("กิน", "ก\u0e34น", 2),  # the vowel sign belongs to its letter
        ("ΟΔΟΣ", "οδος", 1),
    ],
)
def test_what_is_alike(one: str, other: str, number: int) -> None:
    assert word_hashes([one])[0].tolist() == word_hashes([other])[0].tolist()
    assert word_hashes([one])[1].tolist() == [number]


@pytest.mark.parametrize(
    ("one", "other"), [("ab", "ba"), ("ab", "a b"), ("कि", "की"), ("1", "2"), ("が", "き")]
)
def test_what_is_different(one: str, other: str) -> None:
    assert word_hashes([one])[0].tolist() != word_hashes([other])[0].tolist()


def test_ngrams_by_hand() -> None:
    hashes, counts = shingles.shingles(["a b c d", "", "a b c", "b c d", "a b", "b c d e"], n=3)
    assert counts.tolist() == [2, 0, 1, 1, 1, 2]
    abc, bcd, other_abc, other_bcd, ab, bcd_again, cde = hashes.tolist()
    assert abc == other_abc
    assert bcd == other_bcd == bcd_again
    assert len({abc, bcd, ab, cde}) == 4


def test_hashes_never_change() -> None:
    """Files of signatures outlive the program that wrote them."""
    hashes, _ = shingles.shingles(["one two three four five six", "五 個以上の文字"], 5)
    assert hashes.tolist() == [3707774498, 3910140608, 2692470372, 1008563988, 2997900149]
    assert hashes.dtype == np.uint32
