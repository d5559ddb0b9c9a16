"""C4's rules (Raffel et al. 2020, section 2.2): an editor of lines, and statistics of what it left.

The editor keeps lines that end in terminal punctuation and not in an ellipsis, have at least three
words and none of more than 1,000 characters, speak neither of Javascript nor of cookies or terms of
use; it takes citation marks ("[1]", "[citation needed]") out. Of the text that is left:
- `sentences`: C4 wants five. Counted as a run of terminal punctuation before something else.
- `lorem_ipsum`, `curly_brackets`: C4 wants none.

Deviations. Terminal punctuation is that of all scripts, with their quotation marks behind it;
C4 has . ! ? and two ASCII quotes. Thai and Lao end neither sentences nor lines with a mark, but
with a space: their lines need none, and each group of letters between spaces counts as a sentence.
In scripts without spaces a line needs the letters of three words. The list of bad words is left
out: it is no heuristic, and drops texts of some groups of people for their names.
`lorem_ipsum` and `curly_brackets` are looked for in the lines that are kept; C4's code looks in the
whole page, datatrove in the lines with punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt

from qwen2.common.config import Config
from qwen2.corpus.filters import characters as ch
from qwen2.corpus.filters.words import OTHER_LETTERS, WIDE_LETTERS, Words

STATISTICS = ("sentences", "lorem_ipsum", "curly_brackets")
CITATIONS = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
UNWANTED = (
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)
QUOTES = "”’»›」』）"
UNMARKED = re.compile("[\u0e00-\u0eff]")  # Thai and Lao
UNSPACED_LETTERS = re.compile(
    "([\u2e80-\u2fdf\u3005-\u3007\u3021-\u312f\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])"
    "|[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff]"
)
Numbers = NDArray[np.float64]


class C4Lines(Config):
    """What lines the editor keeps; the defaults are C4's."""

    terminal_punctuation: bool = True
    """FineWeb turned this off: it costs 30 % of the tokens."""
    least_words: NonNegativeInt = 3
    longest_word: PositiveInt = 1000
    unwanted: tuple[str, ...] = UNWANTED
    """Lines with one of these, in lower case, are left out."""


def keep_lines(text: str, config: C4Lines = C4Lines()) -> str:  # noqa: B008 (it is frozen)
    """`text` without the lines that C4 leaves out."""
    kept = []
    lowered = text.lower()
    unwanted = [phrase for phrase in config.unwanted if phrase in lowered]
    cited = "[" in text
    for line in text.splitlines():
        line = line.strip()
        if cited:
            line = CITATIONS.sub("", line)
        if config.terminal_punctuation and not _is_terminated(line):
            continue
        words = line.split()
        if len(words) < config.least_words and _words_of(line) < config.least_words:
            continue
        longest = max(map(len, words), default=0)
        if longest > config.longest_word and not UNSPACED_LETTERS.search(line):
            continue
        if unwanted:
            low = line.lower()
            if any(phrase in low for phrase in unwanted):
                continue
        kept.append(line)
    return "\n".join(kept).strip()


def measure(texts: Sequence[str], words: Words) -> dict[str, Numbers]:
    """The statistics of texts that `keep_lines` has edited, (texts,) each, and their `words`."""
    return {
        "sentences": _sentences(texts, words),
        "lorem_ipsum": np.array([text.lower().count("lorem ipsum") for text in texts], np.float64),
        "curly_brackets": np.array([text.count("{") for text in texts], np.float64),
    }


def _is_terminated(line: str) -> bool:
    last = line[-1:]
    if last in ASCII_ENDS:
        return bool(last) and not line.endswith("...")
    if last in QUOTES:
        last = line.rstrip(QUOTES)[-1:]
    return last in ch.terminals() or UNMARKED.match(last) is not None


ASCII_ENDS = ".?!\"'"


def _words_of(line: str) -> float:
    """Words of a line in a script without spaces, by its letters; others count by spaces."""
    letters = UNSPACED_LETTERS.findall(line)
    wide = sum(map(bool, letters))
    return wide / WIDE_LETTERS + (len(letters) - wide) / OTHER_LETTERS


def _sentences(texts: Sequence[str], words: Words) -> Numbers:
    """Words that begin a line, or follow terminal punctuation with nothing but signs between."""
    if not len(words):
        return np.zeros(len(texts))
    ends = ((words.bits & ch.TERMINAL) != 0) & (words.lengths == 1)
    signs = (words.bits & (ch.PUNCTUATION | ch.CONTENT)) == ch.PUNCTUATION
    spoken = np.flatnonzero(~signs)
    feeds = np.cumsum((words.flags & ch.BREAK) != 0)
    line = feeds[words.starts[spoken]]
    ended = np.cumsum(ends)[spoken]
    begins = np.ones(len(spoken), np.bool_)
    begins[1:] = (line[1:] != line[:-1]) | (ended[1:] != ended[:-1])
    # Thai and Lao: a space before the letter.
    start = words.starts[spoken]
    unmarked = (words.codes[start] >= 0x0E00) & (words.codes[start] <= 0x0EFF)
    begins |= unmarked & ((words.flags[np.maximum(start - 1, 0)] & ch.SPACE) != 0)
    of_text = np.searchsorted(words.firsts, spoken[begins], "right") - 1
    return np.bincount(of_text, minlength=len(texts)).astype(np.float64)
