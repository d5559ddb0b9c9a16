"""How much of a text repeats itself: Gopher's repetition statistics (Rae et al. 2021, table A1).

- `duplicate_paragraphs`, `duplicate_lines`: share of them that occurred before in the text, and
  `..._characters`: share of the text's characters in those.
- `top_{n}_gram`, n = 2, 3, 4: characters of the most frequent n-gram (with the spaces inside it)
  times its number, over the text's characters. Of equally frequent ones, the first.
- `duplicate_{n}_grams`, n = 5 ... 10: characters of n-grams that occurred before, over the text's.
  The text is read from its beginning; an n-gram that was met is counted and stepped over whole, so
  that no character is counted twice; one that was stepped over was not met.

These are the readings that datatrove gives to the paper, which leaves the order of counting open.
Deviation: where datatrove compares n-grams of the dup kind as joined characters ("ab" "c" = "a"
"bc"), these compare words.

A text without words, or with fewer than n, has 0 for its n-grams. Scripts without spaces count
letters: there an n-gram is 2n or 3n letters long (`Words.scales`), and no space is counted inside;
the statistics keep their names, so that a rule is one rule in all languages.

One pass for all texts of a batch: n-grams are 64-bit hashes, and only where an n-gram occurs twice
can the (n + 1)-gram do so, so each length looks at fewer places than the one before.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qwen2.corpus.filters.words import GOLDEN, Flags, Hashes, Indices, Words, mix

TOP_GRAMS = (2, 3, 4)
DUPLICATE_GRAMS = (5, 6, 7, 8, 9, 10)
STATISTICS = (
    "duplicate_paragraphs",
    "duplicate_paragraph_characters",
    "duplicate_lines",
    "duplicate_line_characters",
    *(f"top_{n}_gram" for n in TOP_GRAMS),
    *(f"duplicate_{n}_grams" for n in DUPLICATE_GRAMS),
)

FACTOR = np.uint64(0xD6E8FEB86659FD93)  # of the polynomial over word hashes

Numbers = NDArray[np.float64]


def measure(texts: Sequence[str], words: Words) -> dict[str, Numbers]:
    """The statistics of each text, (texts,) each, from the `words` of the same texts."""
    numbers = duplicate_parts(texts)
    numbers |= {name: np.zeros(len(texts)) for name in STATISTICS[len(numbers) :]}
    characters = np.maximum([len(text) for text in texts], 1)
    widths = np.concatenate([[0], np.cumsum(words.lengths)])
    for n, grams in _repeated(words):
        for scale, rule in _readings(n, words.scales):
            if rule in TOP_GRAMS:
                name = f"top_{rule}_gram"
                found = _top_characters(words, widths, grams, n, n - 1 if scale == 1 else 0)
            else:
                name = f"duplicate_{rule}_grams"
                met = _met_again(grams, n)
                of_text = np.searchsorted(words.firsts, met, "right") - 1
                covered = widths[met + n] - widths[met]
                found = np.bincount(of_text, covered, len(texts)).astype(np.float64)
            np.copyto(numbers[name], found / characters, where=words.scales == scale)
    return numbers


def _readings(n: int, scales: Indices) -> list[tuple[int, int]]:
    """(scale, n of the rule) for which an n-gram of `n` tokens counts."""
    pairs = [(int(scale), n // int(scale)) for scale in np.unique(scales) if n % scale == 0]
    return [(scale, rule) for scale, rule in pairs if rule in TOP_GRAMS + DUPLICATE_GRAMS]


def duplicate_parts(texts: Sequence[str]) -> dict[str, Numbers]:
    """Shares of duplicate lines and paragraphs, and of the characters in them.

    Lines are parted by one line feed or more, paragraphs by two or more; an empty line at the
    beginning or end of the text counts as a line, as datatrove has it.
    """
    rows = np.zeros((4, len(texts)))
    for index, text in enumerate(texts):
        rows[:2, index] = _duplicates(_paragraphs(text.strip()), len(text))
        rows[2:, index] = _duplicates(_lines(text), len(text))
    return dict(zip(STATISTICS, rows, strict=False))


def _paragraphs(text: str) -> list[str]:
    parts = text.split("\n\n")
    return [part for part in (p.lstrip("\n") for p in parts) if part] if len(parts) > 1 else parts


def _lines(text: str) -> list[str]:
    lines = list(filter(None, text.split("\n")))
    return [""] * (text[:1] == "\n") + lines + [""] * (text[-1:] == "\n" or not text)


def _duplicates(parts: list[str], characters: int) -> tuple[float, float]:
    unique = set(parts)
    if len(unique) == len(parts):
        return 0.0, 0.0
    again = sum(map(len, parts)) - sum(map(len, unique))
    return (len(parts) - len(unique)) / len(parts), again / max(characters, 1)


@dataclass(frozen=True)
class Grams:
    """The n-grams of one length that occur more than once in their text."""

    places: Indices
    """First words, equal n-grams together, ascending among equals."""
    begins: Indices
    """Where another n-gram begins in `places`."""


def _repeated(words: Words) -> Iterator[tuple[int, Grams]]:
    """Repeated n-grams for each n that some text's rules need, ascending."""
    if not len(words):
        return
    salt = mix(np.arange(1, len(words.firsts), dtype=np.uint64) * GOLDEN)
    text_ends = np.repeat(words.firsts[1:], words.counts)
    longest = np.repeat(words.scales * max(DUPLICATE_GRAMS), words.counts)
    mixed = len(np.unique(words.scales)) > 1
    places = np.arange(len(words))
    hashes = words.hashes + np.repeat(salt, words.counts)
    for n in range(2, int(longest.max()) + 1):
        inside = places + n <= text_ends[places]
        if mixed:
            inside &= n <= longest[places]
        places = places[inside]
        hashes = hashes[inside] * FACTOR + words.hashes[places + (n - 1)]
        keep, order, begins = _group(hashes)
        places, hashes = places[keep], hashes[keep]
        if _readings(n, words.scales):
            yield n, Grams(places[order], begins)
        # The next length needs two repeated n-grams side by side.
        follows = np.zeros(len(places), np.bool_)
        follows[:-1] = places[1:] == places[:-1] + 1
        places, hashes = places[follows], hashes[follows]


def _group(hashes: Hashes) -> tuple[Flags, Indices, Indices]:
    """Which hashes occur twice; of those, the stable order that sorts them, and where in that
    order another one begins."""
    order = np.argsort(hashes)
    ranked = hashes[order]
    same = ranked[1:] == ranked[:-1]
    several = np.zeros(len(hashes), np.bool_)
    several[1:] |= same
    several[:-1] |= same
    first = several.copy()
    first[1:] &= ~same
    members = order[several]
    keep = np.zeros(len(hashes), np.bool_)
    keep[members] = True
    # argsort is fast but not stable: sort numbers of (group, index) once more.
    group = np.cumsum(first[several])
    packed = (group << 32) | (np.cumsum(keep) - 1)[members]
    packed.sort()
    return keep, packed & 0xFFFFFFFF, np.flatnonzero(first[several])


def _top_characters(words: Words, widths: Indices, grams: Grams, n: int, spaces: int) -> Numbers:
    """Characters of the most frequent n-gram times its number, (texts,)."""
    firsts = words.firsts
    texts = len(firsts) - 1
    # Where nothing repeats, each n-gram occurs once and the first counts.
    best = np.where(words.counts >= n, firsts[:-1], -1)
    number = np.ones(texts, np.int64)
    if len(grams.places):
        sizes = np.diff(grams.begins, append=len(grams.places))
        first = grams.places[grams.begins]
        text = np.searchsorted(firsts, first, "right") - 1
        ranking = np.lexsort((first, -sizes, text))
        leaders = ranking[np.unique(text[ranking], return_index=True)[1]]
        best[text[leaders]] = first[leaders]
        number[text[leaders]] = sizes[leaders]
    there = best >= 0
    best = np.where(there, best, 0)
    end = np.minimum(best + n, len(words))
    return np.where(there, (widths[end] - widths[best] + spaces) * number, 0).astype(np.float64)


def _met_again(grams: Grams, n: int) -> Indices:
    """Places of the n-grams that are counted as duplicates: met before, and not stepped over.

    One turn of the loop for each n-gram that is counted, none for words that stand once.
    """
    if not len(grams.places):
        return grams.places
    before = np.full(len(grams.places), -1)  # the same n-gram's place before
    before[1:] = grams.places[:-1]
    before[grams.begins] = -1
    again = before >= 0
    candidates, before = grams.places[again], before[again]
    order = np.argsort(candidates)
    candidates, before = candidates[order], before[order]
    jumps = np.searchsorted(candidates, candidates + n).tolist()
    places, sources = candidates.tolist(), before.tolist()
    source_of = dict(zip(places, sources, strict=True))
    stepped_over = bytearray(places[-1] + n)
    inside = b"\1" * (n - 1)
    met: list[int] = []
    turn, count = 0, len(places)
    while turn < count:
        place, source = places[turn], sources[turn]
        while source >= 0 and stepped_over[source]:
            source = source_of.get(source, -1)
        if source < 0:
            turn += 1
            continue
        met.append(place)
        stepped_over[place + 1 : place + n] = inside
        turn = jumps[turn]
    return np.array(met, np.int64)
