"""The published thresholds as rules; a recipe that says nothing gets these.

Gopher: Rae et al. 2021, A.1.1 and table A1. C4: Raffel et al. 2020, section 2.2. FineWeb: Penedo
et al. 2024 and its published code, whose limit of repeated lines is 0.01 where the paper has 0.1.
Code: Li et al. 2023, section 3. The limits of languages are ours, measured where there was text.
"""

from __future__ import annotations

from qwen2.corpus.filters import stop_words
from qwen2.corpus.filters.rules import Limits, Rule, Rules

GOPHER_QUALITY = (
    Rule(name="gopher_words", statistic="words", least=50, greatest=100_000),
    Rule(name="gopher_word_length", statistic="mean_word_length", least=3, greatest=10),
    Rule(name="gopher_hashes", statistic="hashes_per_word", greatest=0.1),
    Rule(name="gopher_ellipses", statistic="ellipses_per_word", greatest=0.1),
    Rule(name="gopher_bullets", statistic="bullet_lines", greatest=0.9),
    Rule(name="gopher_ellipsis_lines", statistic="ellipsis_lines", greatest=0.3),
    Rule(name="gopher_alphabetic", statistic="alphabetic_words", least=0.8),
    Rule(name="gopher_stop_words", statistic="stop_words"),  # see `LANGUAGES`
)
TABLE_A1 = {
    "duplicate_paragraphs": 0.30,
    "duplicate_paragraph_characters": 0.20,
    "duplicate_lines": 0.30,
    "duplicate_line_characters": 0.20,
    "top_2_gram": 0.20,
    "top_3_gram": 0.18,
    "top_4_gram": 0.16,
    "duplicate_5_grams": 0.15,
    "duplicate_6_grams": 0.14,
    "duplicate_7_grams": 0.13,
    "duplicate_8_grams": 0.12,
    "duplicate_9_grams": 0.11,
    "duplicate_10_grams": 0.10,
}
GOPHER_REPETITION = tuple(
    Rule(name=f"gopher_{name}", statistic=name, greatest=limit) for name, limit in TABLE_A1.items()
)
C4 = (
    Rule(name="c4_sentences", statistic="sentences", least=5),
    Rule(name="c4_lorem_ipsum", statistic="lorem_ipsum", greatest=0),
    Rule(name="c4_curly_brackets", statistic="curly_brackets", greatest=0),
)
FINEWEB = (
    Rule(name="fineweb_punctuated_lines", statistic="punctuated_lines", least=0.12),
    Rule(name="fineweb_short_lines", statistic="short_lines", greatest=0.67),
    Rule(name="fineweb_repeated_lines", statistic="repeated_line_characters", greatest=0.01),
    Rule(name="fineweb_line_feeds", statistic="line_feeds_per_word", greatest=0.3),
)
UNICODE = (
    Rule(name="replacement_characters", statistic="replacement_characters", greatest=0.001),
    Rule(name="unreadable_characters", statistic="unreadable_characters", greatest=0.01),
)

# Measured: what drops the share of translated books that the published limit drops of the same
# books in English (`calibrate`; tests/golden/make_parallel.py; the evidence is in docs/data.md).
# Languages that aren't here were measured too and need no limit of their own, or have too few
# documents. Turkish and Khmer repeat less than English in LibreOffice's help; that is one source's
# tables, so their limits of repetition stay as published.
LEAST_WORDS = {
    "cs": 43, "et": 34, "eu": 42, "fi": 30, "hu": 41, "id": 43, "ko": 35, "lv": 40, "mr": 43,
    "pl": 38, "ru": 38, "sl": 40, "ta": 36, "tr": 37, "zh": 39,
}  # fmt: skip
LEAST_LENGTH = {"ja": 1.98, "ko": 2.56, "zh": 1.97}
LEAST_ALPHABETIC = {
    "ar": 0.777, "cs": 0.763, "da": 0.779, "de": 0.765, "et": 0.75, "eu": 0.733, "fi": 0.745,
    "id": 0.773, "ja": 0.833, "lv": 0.76, "no": 0.769, "pl": 0.765, "ru": 0.755, "uk": 0.766,
    "vi": 0.827, "zh": 0.752,
}  # fmt: skip
MOST_SHORT_LINES = {"ja": 0.53, "km": 0.556, "ko": 0.865}
# Endings make the words of a list rarer.
LEAST_STOP_WORDS = {"fi": 1, "ko": 1}
MEASURED: tuple[tuple[str, dict[str, Limits]], ...] = (
    ("gopher_words", {k: Limits(least=n, greatest=100_000) for k, n in LEAST_WORDS.items()}),
    ("gopher_word_length", {k: Limits(least=n, greatest=10) for k, n in LEAST_LENGTH.items()}),
    ("gopher_alphabetic", {k: Limits(least=n) for k, n in LEAST_ALPHABETIC.items()}),
    ("gopher_stop_words", {k: Limits(least=n) for k, n in LEAST_STOP_WORDS.items()}),
    ("gopher_duplicate_5_grams", {"ja": Limits(greatest=0.2)}),
    ("fineweb_short_lines", {k: Limits(greatest=n) for k, n in MOST_SHORT_LINES.items()}),
)
# By hand, for there is nothing to measure. Three letters are a word there, whatever their marks:
# the mean length says nothing. Thai and Lao have no mark at the end of a sentence.
NO_LENGTH = {"gopher_word_length": Limits(greatest=10)}
NO_MARKS = {"fineweb_punctuated_lines": Limits()}
BY_HAND = {"lo": NO_LENGTH | NO_MARKS, "my": NO_LENGTH, "th": NO_LENGTH | NO_MARKS}


def _languages() -> dict[str, dict[str, Limits]]:
    """Two stop words wherever there is a list of them, and what was measured or set by hand."""
    limits = {
        language: {"gopher_stop_words": Limits(least=2)} | BY_HAND.get(language, {})
        for language in sorted({**stop_words.SPACED, **stop_words.UNSPACED})
    }
    for rule, of_language in MEASURED:
        for language, limit in of_language.items():
            limits[language][rule] = limit
    return limits


LANGUAGES = _languages()
TEXT_RULES = Rules(
    rules=(*GOPHER_QUALITY, *GOPHER_REPETITION, *C4, *FINEWEB, *UNICODE), languages=LANGUAGES
)
CODE_RULES = Rules(
    rules=(
        Rule(name="code_longest_line", statistic="longest_line", greatest=1000),
        Rule(name="code_mean_line", statistic="mean_line", greatest=100),
        Rule(name="code_alphanumeric", statistic="alphanumeric_share", least=0.25),
        Rule(name="code_generated", statistic="generated", greatest=0),
        Rule(name="code_minified", statistic="minified", greatest=0.5),
        Rule(name="code_licence", statistic="restrictive_licence", greatest=0),
        *UNICODE,
    )
)
