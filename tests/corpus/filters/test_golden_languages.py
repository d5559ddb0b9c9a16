"""Golden prose in 30 languages passes; the same prose spoilt is dropped, by the rule that should.

`test_parallel.py` tries the same limits on numbers of translated books.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from qwen2.corpus.filters import (
    TEXT_RULES,
    C4Lines,
    Rules,
    keep_lines,
    measure_text,
)
from qwen2.corpus.language import REPORT_LANGUAGES

GOLDEN = Path(__file__).parents[2] / "golden"
PROSE = json.loads((GOLDEN / "prose.json").read_text(encoding="utf-8"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"golden_{name}", GOLDEN / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SPOILT = load("spoilt")


def failed(text: str, language: str, lines: C4Lines | None = None) -> set[str]:
    kept = [keep_lines(text, lines)] if lines else None
    columns = measure_text([text], [language], kept)
    return {failure.rule for failure in TEXT_RULES.judge_all(columns, [language])[0]}


def test_there_is_prose_in_every_language_of_the_report() -> None:
    assert set(PROSE) == {*REPORT_LANGUAGES, "uk"}


@pytest.mark.parametrize("language", PROSE)
def test_good_prose_passes(language: str) -> None:
    text = PROSE[language]
    assert failed(text, language) == set()
    assert failed(text, language, C4Lines()) == set()
    assert keep_lines("\n".join(SPOILT.sentences(text))).count("\n") >= 5 - 5 * (language == "th")


@pytest.mark.parametrize("kind", SPOILT.SPOILT, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("language", PROSE)
def test_spoilt_prose_is_dropped_by_the_right_rule(language: str, kind) -> None:
    found = failed(kind(PROSE[language], language), language)
    assert SPOILT.SPOILT[kind] in found
    if kind is SPOILT.without_stop_words:
        assert found <= {"gopher_stop_words", "gopher_words", "gopher_alphabetic", "c4_sentences"}


@pytest.mark.parametrize("language", sorted(set(PROSE) - {"th", "lo"}))
def test_headings_have_no_sentence(language: str) -> None:
    # Thai and Lao end no line with a mark: there C4's rule of lines has nothing to go by.
    text = SPOILT.headings(PROSE[language], language)
    assert keep_lines(text) == ""
    assert "c4_sentences" in failed(text, language, C4Lines())
    assert "fineweb_punctuated_lines" in failed(text, language)


@pytest.mark.parametrize("language", ["zh", "ja", "ko", "th", "lo", "my", "km", "vi"])
def test_english_limits_would_drop_good_prose_or_keep_bad(language: str) -> None:
    english = Rules(rules=TEXT_RULES.rules, languages={"xx": TEXT_RULES.languages["en"]})
    columns = measure_text([PROSE[language]], [language])
    failures = {f.rule for f in english.judge_all(columns, ["xx"])[0]}
    expected = {
        "zh": {"gopher_word_length"},
        "ja": {"gopher_word_length"},
        "ko": {"gopher_word_length"},
        "th": {"fineweb_punctuated_lines"},
    }
    assert failures == expected.get(language, set())
