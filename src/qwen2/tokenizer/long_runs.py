"""Very long runs of blanks, which tiktoken's engine cannot take in one piece.

It keeps a stack entry for every blank that `\\s+(?!\\S)` tries, and overflows at a million. Runs
half as long are cut off before it, and a form of the expression, the same language but 3% slower,
takes a run that ends a text without trying.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

LONG_RUN = 500_000
"""Characters from which on a run of blanks is long."""

# \s of the regular expression without the line ends: Unicode's White_Space, not Python's.
_BLANKS = re.compile("[\t\v\f \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+")


def for_long_runs(pre_tokens: str) -> str:
    """The form of the expression for texts with long runs."""
    return pre_tokens.replace(r"|\s+(?!\S)", r"|\s++$|\s+(?!\S)")


def may_have_long_run(text: str) -> bool:
    """False when no run of blanks is longer than `LONG_RUN`: each would hold a whole block."""
    step = LONG_RUN // 2
    return any(text[i : i + step].isspace() for i in range(0, len(text), step))


def cut_long_runs(text: str) -> Iterator[str]:
    """Cut `text` in front of the last blank of each long run that other text follows.

    The regular expression cuts there too: that blank belongs to what follows.
    """
    start = 0
    for run in _BLANKS.finditer(text):
        follows = text[run.end() : run.end() + 1]
        if run.end() - run.start() >= LONG_RUN and follows not in ("", "\r", "\n"):
            yield text[start : run.end() - 1]
            start = run.end() - 1
    yield text[start:]
