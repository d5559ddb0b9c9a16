"""Good prose spoilt in ways that a filter must see, in any language, and the rule that sees it."""

import re
from collections.abc import Callable

from qwen2.corpus.filters import stop_words

UNSPACED = frozenset(stop_words.UNSPACED)
MARKS = ".,;:!?«»—“”\"'()،؛؟۔।。、，។။၊"


def sentences(text: str) -> list[str]:
    """Without white space at their ends; Thai, which marks none, in pieces between spaces."""
    return [part for part in re.split(r"(?<=[.。။។۔।]) ?", text) if part]


def pieces(text: str, language: str) -> list[str]:
    """Words, or four characters where there are no spaces."""
    if language in UNSPACED:
        joined = text.replace(" ", "")
        return [joined[at : at + 4] for at in range(0, len(joined), 4)]
    return text.split()


def repeated(text: str, language: str) -> str:
    """The same line three times."""
    return "\n".join([text] * 3)


def in_circles(text: str, language: str) -> str:
    """One sentence of it again and again, with others between, as generated text does."""
    first, *others = pieces(text, language)
    phrase = join([first, *others[:15]], language)
    return join([f"{phrase}{gap(language)}{other}" for other in others], language)


def hashes(text: str, language: str) -> str:
    """A "#" before every third word."""
    parts = pieces(text, language)
    return " ".join(f"# {part}" if at % 3 == 0 else part for at, part in enumerate(parts))


def numbers(text: str, language: str) -> str:
    """A number behind every word, as in a table."""
    return " ".join(f"{part} {at * 37 % 101}" for at, part in enumerate(pieces(text, language)))


def truncated(text: str, language: str) -> str:
    """Lines that break off, as teasers do."""
    parts = pieces(text, language)
    lines = [join(parts[at : at + 6], language) for at in range(0, len(parts), 6)]
    return "\n".join(f"{line.rstrip(MARKS)}…" for line in lines)


def headings(text: str, language: str) -> str:
    """Lines without an end: a table of contents."""
    lines = truncated(text, language).split("\n")
    return "\n".join(line.strip("…" + MARKS) for line in lines)


def menu(text: str, language: str) -> str:
    """A word or two a line: what stands around a page."""
    return "\n".join(pieces(text, language))


def without_stop_words(text: str, language: str) -> str:
    """A list of key words."""
    if language in UNSPACED:
        for word in sorted(stop_words.inside(language), key=len, reverse=True):
            text = text.replace(word, "")
        return text
    own = set(stop_words.SPACED[language].split())
    return " ".join(part for part in text.split() if part.strip(MARKS).lower() not in own)


def beginning(text: str, language: str) -> str:
    """The first sentence alone."""
    return text[: len(text) // 6]


def bullets(text: str, language: str) -> str:
    """Every line an item."""
    return "\n".join(f"- {line}" for line in headings(text, language).split("\n"))


def gap(language: str) -> str:
    return "" if language in UNSPACED else " "


def join(parts: list[str], language: str) -> str:
    return gap(language).join(parts)


SPOILT: dict[Callable[[str, str], str], str] = {
    repeated: "gopher_duplicate_lines",
    in_circles: "gopher_duplicate_10_grams",
    hashes: "gopher_hashes",
    numbers: "gopher_alphabetic",
    truncated: "gopher_ellipsis_lines",
    bullets: "gopher_bullets",
    menu: "fineweb_short_lines",
    without_stop_words: "gopher_stop_words",
    beginning: "gopher_words",
}
