"""Statistics by hand; any Unicode gives finite numbers that don't depend on the batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.corpus.filters import (
    CODE_STATISTICS,
    TEXT_RULES,
    TEXT_STATISTICS,
    C4Lines,
    FilterSet,
    keep_lines,
    measure_code,
    measure_text,
)
from qwen2.corpus.filters.measures import Numbers

PROSE = json.loads(
    (Path(__file__).parents[2] / "golden" / "prose.json").read_text(encoding="utf-8")
)
ANY = st.text(st.characters(exclude_categories=()), max_size=80)
LINES = st.text('ab. -•…#{"?!我。ที่\n\t[1]', max_size=80)
TEXTS = ANY | LINES
SHARES = ("bullet_lines", "ellipsis_lines", "alphabetic_words", "punctuated_lines", "short_lines",
          "repeated_line_characters", "replacement_characters",
          "unreadable_characters")  # fmt: skip


def measured(
    texts: list[str], languages: list[str | None], lines: C4Lines | None = None
) -> dict[str, Numbers]:
    kept = [keep_lines(text, lines) for text in texts] if lines else None
    return measure_text(texts, languages, kept)


def of(text: str, language: str | None = "en", lines: C4Lines | None = None) -> dict[str, float]:
    columns = measured([text], [language], lines)
    assert tuple(columns) == TEXT_STATISTICS
    return {name: float(values[0]) for name, values in columns.items()}


@given(st.lists(TEXTS, max_size=5), st.sampled_from(["en", "zh", "th", "xx", None]))
def test_any_unicode_gives_finite_numbers_whatever_the_batch(
    texts: list[str], language: str | None
) -> None:
    together = measured(texts, [language] * len(texts), C4Lines())
    for index, text in enumerate(texts):
        alone = of(text, language, C4Lines())
        for name, value in alone.items():
            assert np.isfinite(value)
            assert value >= 0
            assert together[name][index] == value, name
        assert all(alone[name] <= 1 for name in SHARES)


def test_gopher_by_hand() -> None:
    # Words: The, cat, 's, hat, 42; signs: ... # twice each or once; 9 tokens in all.
    text = "The cat's hat ... 42 # #\n- x..."
    numbers = of(text)
    assert numbers["words"] == 6
    assert numbers["mean_word_length"] == (3 + 3 + 2 + 3 + 2 + 1) / 6
    tokens = 11  # The cat 's hat ... 42 # # - x ...
    assert numbers["hashes_per_word"] == pytest.approx(2 / tokens)
    assert numbers["ellipses_per_word"] == pytest.approx(2 / tokens)
    assert numbers["bullet_lines"] == 1 / 2
    assert numbers["ellipsis_lines"] == 1 / 2
    assert numbers["alphabetic_words"] == pytest.approx(5 / tokens)
    assert of("to be of the the with")["stop_words"] == 5
    assert of("to be of the the with", "de")["stop_words"] == 0
    assert of("我的书在这里", "zh")["stop_words"] == 4  # 我 的 在 这
    assert of("to be", "xx")["stop_words"] == 0


def test_words_of_scripts_without_spaces_are_letters_in_part() -> None:
    assert of("北京是一个城市。", "zh")["words"] == 7 / 2
    assert of("北京是一个城市。", "zh")["mean_word_length"] == 2
    assert of("ที่นี่ดี", "th")["words"] == pytest.approx(3 / 3)


def test_fineweb_by_hand() -> None:
    # Four lines that are not blank: two end a sentence, all are short, one repeats another.
    numbers = of("One two.\n\nhead\nhead\n  \n您好。")
    assert numbers["punctuated_lines"] == 2 / 4
    assert numbers["short_lines"] == 1
    assert numbers["repeated_line_characters"] == 4 / (8 + 4 + 4 + 2 + 3)
    assert numbers["line_feeds_per_word"] == pytest.approx(5 / (3 + 2 + 1 + 1))
    assert of("x" * 30)["short_lines"] == 1
    assert of("x" * 31)["short_lines"] == 0
    assert of("我" * 12)["short_lines"] == 1
    assert of("我" * 13)["short_lines"] == 0


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("A line that ends well.", True),
        ("  Is this one kept?  ", True),
        ('He said "I know."', True),
        ("«Nous le savons.»", True),
        ("A line without an end", False),
        ("A line that goes on...", False),
        ("Two words.", False),
        ("Please enable JavaScript to go on.", False),
        ("This site uses cookies to please you.", False),
        ("One " + "x" * 1001 + " two.", False),
        ("我们今天在北京。", True),
        ("你好。", False),
        ("他对我说：“我知道。”", True),
        ("เธอเปิดร้านแต่เช้า", True),
        ("यह एक वाक्य है।", True),
    ],
)
def test_c4_keeps_lines(line: str, kept: bool) -> None:
    assert keep_lines(line) == (line.strip() if kept else "")


def test_c4_by_hand() -> None:
    numbers = of('One is here. Two is there! Is it? "Yes it is." Fine.\nA line {now} of it.')
    assert numbers["sentences"] == 6
    assert numbers["curly_brackets"] == 1
    assert of("Lorem ipsum, he said. lorem ipsum.")["lorem_ipsum"] == 2
    assert keep_lines("The mill[1] is old.[citation needed]") == "The mill is old."
    assert (
        keep_lines("a heading\nTwo.", C4Lines(terminal_punctuation=False, least_words=2))
        == "a heading"
    )


@given(TEXTS)
def test_c4_keeps_lines_of_the_text_and_is_idempotent(text: str) -> None:
    once = keep_lines(text)
    if "[" not in text:
        whole = [line.strip() for line in text.splitlines()]
        assert all(line in whole for line in once.splitlines())
        assert keep_lines(once) == once


@pytest.mark.parametrize("language", PROSE)
def test_prose_passes_in_every_language(language: str) -> None:
    text = keep_lines(PROSE[language])
    assert len(text) == len(PROSE[language])
    numbers = of(text, language)
    assert TEXT_RULES.judge(numbers, language) == ()
    assert 60 <= numbers["words"] <= 110  # the same story, so about as many words
    repeated = of("\n".join([text] * 3), language)
    failed = {failure.rule for failure in TEXT_RULES.judge(repeated, language)}
    assert {"gopher_duplicate_lines", "gopher_duplicate_10_grams"} <= failed


def test_code_by_hand() -> None:
    text = "# Generated by a tool\nab = 1\n"
    columns = measure_code([text, "x" * 1200 + "\na b\n", ""])
    assert tuple(columns) == CODE_STATISTICS
    assert columns["longest_line"].tolist() == [21, 1200, 0]
    assert columns["mean_line"].tolist() == [29 / 3, 1205 / 3, 0]
    assert columns["alphanumeric_share"].tolist() == [(16 + 3) / 29, 1202 / 1205, 0]
    assert columns["generated"].tolist() == [1, 0, 0]
    assert columns["minified"].tolist() == [0, 1200 / 1205, 0]


@given(st.lists(TEXTS, max_size=4))
def test_any_unicode_is_measured_as_code(texts: list[str]) -> None:
    columns = measure_code(texts)
    for index, text in enumerate(texts):
        for name, values in measure_code([text]).items():
            assert np.isfinite(values[0])
            assert columns[name][index] == values[0]


def test_a_recipe_names_rules_that_are_measured() -> None:
    rules = {"rules": [{"name": "a", "statistic": "word", "least": 1}]}
    with pytest.raises(UserError, match="no statistic is called 'word'"):
        FilterSet.parse({"rules": rules})
    rules["rules"][0]["statistic"] = "words"
    assert FilterSet.parse({"rules": rules}).judged == {"words"}
