"""Filters for source code: licence headers, generated and minified files, lines, letters.

Statistics, after The Stack and StarCoder (Kocetkov et al. 2022; Li et al. 2023, section 3):
- `longest_line`, `mean_line`: characters. StarCoder's limits are 1,000 and 100.
- `alphanumeric_share`: of characters, letters and digits of any script. At least 0.25.
- `generated`: 1 when a marker of a generator stands in the first lines. At most 0.
- `minified`: share of characters in lines longer than 500 that have few spaces. At most 0.5: ours,
  for bundles whose mean line is within the limit only thanks to a long comment.
- `restrictive_licence`: 1 when the header names a licence that asks for more than a notice. The
  source's own licence (`Document.licence`) goes before: this only reads what the file says.

`without_licence_header` is an editor: it takes the licence out of the first comment of a file,
which would else be among the most repeated text of any corpus of code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qwen2.corpus.filters import characters as ch

STATISTICS = (
    "longest_line",
    "mean_line",
    "alphanumeric_share",
    "generated",
    "minified",
    "restrictive_licence",
)
HEAD = 4000  # characters of a file in which its header stands
GENERATED_LINES = 5
GENERATED = re.compile(
    r"(?i)\b(?:auto-?generated|automatically generated|generated (?:by|from|with|using|code|file)"
    r"|@generated|machine generated|do not (?:edit|modify))\b|@generated\b"
)
LONG = 500
FEW_SPACES = 0.1
SPDX = re.compile(r"SPDX-License-Identifier:[ \t]*([^\s*/#][^\n*]*)")
LICENCE_WORDS = re.compile(
    r"(?i)\bcopyright\b|\(c\) ?\d{4}|©|\blicen[sc]ed?\b|spdx-license|all rights reserved"
    r"|\bwarranty\b"
)
NAMES = (
    ("AGPL-3.0", r"affero general public licen[sc]e"),
    ("LGPL-2.1", r"(?:lesser|library) general public licen[sc]e"),
    ("GPL-2.0", r"general public licen[sc]e|\bgnu gpl\b"),
    ("MPL-2.0", r"mozilla public licen[sc]e"),
    ("EPL-2.0", r"eclipse public licen[sc]e"),
    ("CC-BY-NC", r"creative commons [^.]{0,40}non-?commercial"),
    ("Apache-2.0", r"apache licen[sc]e"),
    ("BSD-3-Clause", r"redistribution and use in source and binary forms|bsd-style|bsd licen[sc]e"),
    ("ISC", r"permission to use, copy, modify, and/or distribute|\bisc licen[sc]e"),
    ("MIT", r"permission is hereby granted, free of charge|\bmit licen[sc]e"),
    ("Unlicense", r"free and unencumbered software|\bpublic domain\b"),
    ("proprietary", r"\bproprietary\b|\bconfidential\b"),
)
LICENCES = tuple((name, re.compile(pattern, re.IGNORECASE)) for name, pattern in NAMES)
RESTRICTIVE = re.compile(
    r"(?i)\bA?L?GPL|\bMPL|\bEPL|\bCDDL|\bEUPL|\bOSL|-NC\b|-SA\b|-ND\b|proprietary"
)
# The first comment of a file: a block, or lines that begin alike.
COMMENT = re.compile(
    r"""(?x) \A (?P<before> \ufeff? (?:\#![^\n]*\n)? (?:<\?(?:php|xml)[^\n]*\n)? \s* )
    (?P<comment>
      /\*.*?\*/ [ \t]*\n? | <!--.*?--> [ \t]*\n? | \(\*.*?\*\) [ \t]*\n? | \{-.*?-\} [ \t]*\n?
    | (?: [ \t]*\#[^\n]*(?:\n|\Z) )+ | (?: [ \t]*//[^\n]*(?:\n|\Z) )+
    | (?: [ \t]*--[^\n]*(?:\n|\Z) )+
    | (?: [ \t]*;[^\n]*(?:\n|\Z) )+ | (?: [ \t]*%[^\n]*(?:\n|\Z) )+ )""",
    re.DOTALL,
)
CODING = re.compile(r"coding[:=]\s*[-\w.]+")
Numbers = NDArray[np.float64]


def licence(text: str) -> str | None:
    """The SPDX expression that the file's beginning states, or the licence that it names there."""
    head = text[:HEAD]
    stated = SPDX.search(head)
    if stated:
        return stated[1].strip().removesuffix("-->").strip()
    if not LICENCE_WORDS.search(head):
        return None
    plain = " ".join(re.sub(r"[#*/;%-]+", " ", head).split())
    return next((name for name, pattern in LICENCES if pattern.search(plain)), None)


def without_licence_header(text: str) -> str:
    """`text` without its first comment, if that speaks of a licence.

    A line "#!" and one that declares an encoding stay.
    """
    found = COMMENT.match(text)
    if found is None or not LICENCE_WORDS.search(found["comment"]):
        return text
    coding = [line for line in found["comment"].splitlines(True)[:2] if CODING.search(line)]
    rest = text[found.end() :].lstrip("\n")
    return found["before"].lstrip("\ufeff") + "".join(coding) + rest


def measure(texts: Sequence[str]) -> dict[str, Numbers]:
    """The statistics of each text, (texts,) each."""
    numbers = np.zeros((len(STATISTICS), len(texts)))
    for index, text in enumerate(texts):
        flags = ch.table()[ch.codes(text)]
        alphanumeric = np.count_nonzero(flags & (ch.ALPHA | ch.DIGIT))
        numbers[2, index] = alphanumeric / max(len(text), 1)
        lines = text.split("\n")
        lengths = list(map(len, lines))
        numbers[0, index] = max(lengths)
        numbers[1, index] = len(text) / len(lines)
        beginning = "\n".join(lines[:GENERATED_LINES])[:HEAD]
        numbers[3, index] = GENERATED.search(beginning) is not None
        if numbers[0, index] > LONG:
            dense = (n for n, line in zip(lengths, lines, strict=True) if n > LONG and _dense(line))
            numbers[4, index] = sum(dense) / len(text)
        numbers[5, index] = _is_restrictive(licence(text))
    return dict(zip(STATISTICS, numbers, strict=True))


def _dense(line: str) -> bool:
    return line.count(" ") < FEW_SPACES * len(line)


def _is_restrictive(name: str | None) -> bool:
    """Whether no alternative of an SPDX expression is permissive."""
    if name is None:
        return False
    return all(RESTRICTIVE.search(part) for part in re.split(r"\s+OR\s+", name))
