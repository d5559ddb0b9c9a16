"""What a line says nothing of its language by: addresses, markup, numbers and signs.

One expression would do, and is slow: most of it is tried at every character of every line, though
few lines have a mail address or a tag. So each line gets an expression of only what it can hold.
"""

from __future__ import annotations

import functools
import re

# In the order in which they are tried. None matches across lines.
ADDRESSES = r"[a-z][a-z0-9+.-]{1,12}://\S+|www\.\S+"
MAIL = r"(?<![\w.+-])[\w.+-]{1,64}@[\w-]+\.[\w.-]+"
MARKUP = r"&\w{1,8};|</?\w[^<>\n]{0,200}>"
NUMBERS = r"\b\w*[_\d]\w*"
SIGNS = r"[\d#*/\\|<>=+~^`{}\[\]()_$%&@\"“”«»•·–—-]+"
NUMERIC = re.compile(r"[_\d]")


def without_noise(line: str) -> str:
    """The line with spaces for addresses, markup, words with digits, numbers and signs."""
    addresses = "://" in line or "www." in line.lower()
    markup = "&" in line or "<" in line
    return expression(addresses, "@" in line, markup, bool(NUMERIC.search(line))).sub(" ", line)


@functools.cache
def expression(addresses: bool, mail: bool, markup: bool, numbers: bool) -> re.Pattern[str]:
    """What can occur, as one expression; signs always can."""
    given = ((addresses, ADDRESSES), (mail, MAIL), (markup, MARKUP), (numbers, NUMBERS))
    parts = [pattern for there, pattern in given if there]
    return re.compile("|".join([*parts, SIGNS]), re.IGNORECASE)
