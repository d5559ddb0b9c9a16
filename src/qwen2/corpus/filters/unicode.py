"""Repair of bad Unicode: an editor, and the statistics of what cannot be mended.

`repair` joins surrogate pairs and drops lone surrogates, takes out control sequences of terminals
(colours) as a whole, control characters, byte order marks inside text and other non-characters,
brings line ends to "\\n", and undoes mojibake (text that was decoded in a wrong encoding) by ftfy
(Apache-2.0), line by line. Nothing else of ftfy's: quotes, ligatures and widths stay as their
author wrote them.

- `replacement_characters`: share of U+FFFD, where a decoder before us has lost something.
- `unreadable_characters`: share of control characters, lone surrogates, private and unassigned code
  points in the text as it came.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from qwen2.common.errors import UserError
from qwen2.corpus.filters import characters as ch

STATISTICS = ("replacement_characters", "unreadable_characters")
LINE_ENDS = re.compile("\r\n?|\x85|\u2028")
PAIR = re.compile("([\ud800-\udbff])([\udc00-\udfff])")
SURROGATES = re.compile("[\ud800-\udfff]")
# C0 and C1 controls but tab and line feed, byte order marks, non-characters, interlinear marks.
DROPPED = re.compile(
    "[\x00-\x08\x0b\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ufff9-\ufffb\ufffe\uffff"
    + "".join(
        f"{chr(plane | 0xFFFE)}{chr(plane | 0xFFFF)}" for plane in range(0x10000, 0x110000, 0x10000)
    )
    + "]"
)
SEQUENCES = re.compile("\x1b\\[[0-?]*[ -/]*[@-~]")  # ECMA-48, 5.4
# A letter that mojibake begins with, and then another of its kind or a C1 control.
SUSPECT = re.compile("[\x80-\xff\u0100-\u024f\u0370-\u052f\u0590-\u05ff\u0e00-\u0e7f][^\x00-\x7f]")
Numbers = NDArray[np.float64]


def repair(text: str) -> str:
    """`text` in valid Unicode: it can be written as UTF-8, and repairing it again changes nothing.

    Raises:
        UserError: ftfy is not installed, and the text has what may be mojibake.
    """
    if text.isascii() and not DROPPED_ASCII.search(text):
        return text
    text = SURROGATES.sub("", PAIR.sub(_joined, text))
    if "\x1b" in text:
        text = SEQUENCES.sub("", text)
    previous = None
    # What is dropped may have hidden more mojibake, and a text may have been spoilt twice.
    while previous != text:
        previous = text
        if SUSPECT.search(text):
            text = _undo_mojibake(text)
        text = DROPPED.sub("", LINE_ENDS.sub("\n", text))
    return text


DROPPED_ASCII = re.compile("[\x00-\x08\x0b\r\x0e-\x1f\x7f]")


def measure(texts: Sequence[str]) -> dict[str, Numbers]:
    """The statistics of each text, (texts,) each."""
    numbers = np.zeros((2, len(texts)))
    for index, text in enumerate(texts):
        if text.isascii() and not DROPPED_ASCII.search(text):
            continue
        numbers[0, index] = text.count("\ufffd") / len(text)
        numbers[1, index] = np.count_nonzero(ch.unreadable()[ch.codes(text)]) / len(text)
    return dict(zip(STATISTICS, numbers, strict=True))


def _joined(pair: re.Match[str]) -> str:
    high, low = ord(pair[1]) - 0xD800, ord(pair[2]) - 0xDC00
    return chr(0x10000 + (high << 10) + low)


def _undo_mojibake(text: str) -> str:
    fix = _fixer()
    return "\n".join(fix(line) if SUSPECT.search(line) else line for line in text.split("\n"))


@functools.cache
def _fixer() -> Callable[[str], str]:
    try:
        import ftfy
    except ImportError:
        raise UserError("repairing text needs ftfy: pip install 'qwen2[corpus]'") from None
    return ftfy.fix_encoding
