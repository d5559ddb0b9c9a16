import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.corpus.stripped import Stripped
from qwen2.tokenizer import Tokenizer

TOKENIZER = Tokenizer.qwen2()
STRIPPED = Stripped(TOKENIZER.encode)


def ids(text: str) -> list[int]:
    return STRIPPED.ids(text).tolist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Hello, World!", "hello world"),
        ("**bold** _it_ [link](x)", "Bold it link x"),
        ("a\n\n\tb   c", "a b c"),
        ("Café", "cafe\u0301"),
        ("soft\u00adhyphen", "softhyphen"),
        ("你好，世界。", "你好 世界"),
        ("5 + 3 = 8", "5, 3 and 8".replace("and", "—")),
        ("🙂 smile", "smile"),
    ],
)
def test_symbols_case_and_spaces_make_no_difference(one: str, other: str) -> None:
    assert ids(one) == ids(other)
    assert ids(one)


def test_the_ids_are_those_of_the_stripped_text() -> None:
    text = 'The "cat" sat on 3 mats; naïve Привет हिन्दी.'
    stripped = " the cat sat on"
    rest = "3"
    last = " mats naïve привет हिन्दी"
    expected = [t for part in (stripped, rest, last) for t in TOKENIZER.encode(part)]
    assert ids(text) == expected
    assert ids("3 4") == [*TOKENIZER.encode("3"), *TOKENIZER.encode("4")]


@given(st.text())
def test_only_letters_marks_and_digits_count(text: str) -> None:
    inside = "".join(
        x if unicodedata.category(x)[0] in "LMN" or unicodedata.category(x) == "Cf" else " "
        for x in text
    )
    if all(ord(x) < 0x10000 for x in text):  # beyond, blocks stand for categories
        assert ids(text) == ids(inside)
    spans = STRIPPED.spans(text)
    assert len(spans) == len(ids(text))
    assert spans == sorted(spans)
    for a, b in spans:
        assert not any(unicodedata.category(x)[0] in "PZ" for x in text[a:b] if ord(x) < 0x10000)


def test_spans_by_hand() -> None:
    text = "Hello, antidisestablishment!"
    number = len(TOKENIZER.encode(" antidisestablishment"))
    assert number > 1
    assert STRIPPED.spans(text) == [(0, 5)] + [(7, 27)] * number


def test_forgetting_words_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2.corpus.stripped.REMEMBERED", 1)
    few = Stripped(TOKENIZER.encode)
    for text in ("one two three", "two three four"):
        assert few.ids(text).tolist() == ids(text)
