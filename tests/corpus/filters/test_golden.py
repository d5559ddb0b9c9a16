"""The same decisions as datatrove, by the same rule, on documents that every rule has a say on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from qwen2.corpus.filters import Rules, defaults, keep_lines, measure_text, measures

GOLDEN = Path(__file__).parents[2] / "golden"
DECISIONS = json.loads((GOLDEN / "datatrove.json").read_text())
NAMES = {  # datatrove's names, where they are not our statistic's
    "gopher_short_doc": "gopher_words",
    "gopher_long_doc": "gopher_words",
    "gopher_below_avg_threshold": "gopher_word_length",
    "gopher_above_avg_threshold": "gopher_word_length",
    "gopher_too_many_hashes": "gopher_hashes",
    "gopher_too_many_ellipsis": "gopher_ellipses",
    "gopher_too_many_bullets": "gopher_bullets",
    "gopher_too_many_end_ellipsis": "gopher_ellipsis_lines",
    "gopher_below_alpha_threshold": "gopher_alphabetic",
    "gopher_enough_stop_words": "gopher_stop_words",
    "too_few_sentences": "c4_sentences",
    "lorem_ipsum": "c4_lorem_ipsum",
    "curly_bracket": "c4_curly_brackets",
    "line_punct_ratio": "fineweb_punctuated_lines",
    "short_line_ratio": "fineweb_short_lines",
    "char_dup_ratio": "fineweb_repeated_lines",
    "list_ratio": "fineweb_line_feeds",
    "dup_para_frac": "gopher_duplicate_paragraphs",
    "dup_para_char_frac": "gopher_duplicate_paragraph_characters",
    "dup_line_frac": "gopher_duplicate_lines",
    "dup_line_char_frac": "gopher_duplicate_line_characters",
    **{f"top_{n}_gram": f"gopher_top_{n}_gram" for n in (2, 3, 4)},
    **{f"duplicated_{n}_n_grams": f"gopher_duplicate_{n}_grams" for n in range(5, 11)},
}
FILTERS = {
    "gopher_repetition": defaults.GOPHER_REPETITION,
    "gopher_quality": defaults.GOPHER_QUALITY,
    "c4": defaults.C4,
    "fineweb": defaults.FINEWEB,
}


def documents() -> list[str]:
    spec = importlib.util.spec_from_file_location("golden_documents", GOLDEN / "documents.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.documents()


@pytest.mark.parametrize("name", FILTERS)
def test_decides_as_datatrove_does_and_by_the_same_rule(name: str) -> None:
    texts = documents()
    languages = ["en"] * len(texts)
    kept = [keep_lines(text) for text in texts] if name == "c4" else None
    columns = measure_text(texts, languages, kept)
    rules = Rules(rules=FILTERS[name], languages={"en": english(name)})
    ours = [{failure.rule for failure in found} for found in rules.judge_all(columns, languages)]
    # datatrove names one rule, ours all.
    theirs = [{NAMES[reason]} if reason else set() for reason in DECISIONS[name]]
    assert len(set(map(frozenset, theirs))) > 2, "golden documents that say little"
    assert list(map(bool, ours)) == list(map(bool, theirs))
    assert all(b <= a for a, b in zip(ours, theirs, strict=True))


def english(name: str) -> dict:
    return defaults.LANGUAGES["en"] if name == "gopher_quality" else {}


def test_default_rules_and_statistics_match() -> None:
    assert defaults.TEXT_RULES.statistics <= set(measures.TEXT_STATISTICS)
    assert defaults.CODE_RULES.statistics <= set(measures.CODE_STATISTICS)
