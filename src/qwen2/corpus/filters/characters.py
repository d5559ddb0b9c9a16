"""What each character is, as bits of one table over all of Unicode: letter, space, punctuation ...

The table is made once a process, from `unicodedata`, when it is first needed. Assigned characters
end below U+323B0 apart from tags and private use, which take the bits of their category.
"""

from __future__ import annotations

import functools
import sys
import unicodedata
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint32]
Bits = NDArray[np.uint16]

SPACE = 1 << 0
"""Parts words: what `str.isspace` says."""
ALPHA = 1 << 1
"""A letter of any script: what `str.isalpha` says."""
LOWER = 1 << 2
UPPER = 1 << 3
DIGIT = 1 << 4
"""0 to 9."""
CONTENT = 1 << 5
"""Neither space, punctuation, symbol nor control: a word of characters without it is a symbol."""
EDGE = 1 << 6
"""A token of its own at either end of a word."""
OPENER = 1 << 7
"""A token of its own at the beginning of a word."""
HYPHEN = 1 << 8
"""Parts two letters."""
ALONE = 1 << 9
"""A token of its own wherever it stands."""
UNSPACED = 1 << 10
"""A letter of a script that has no spaces between words: a token of its own, with its marks."""
MARK = 1 << 11
"""Combining, or a joiner or space of no width: belongs to the character before it."""
TERMINAL = 1 << 12
"""Ends a sentence."""
PUNCTUATION = 1 << 13
BREAK = 1 << 14
"""Ends a line, as `str.splitlines` has it."""

WIDE = 1 << 15
"""Of the unspaced, Han and kana, of which two letters make a word; of the others, three."""

# Blocks of scripts written without spaces: South-East Asia and the east.
UNSPACED_BLOCKS = (
    (0x0E00, 0x0FFF),  # Thai, Lao, Tibetan
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),
    (0x3021, 0x312F),  # kana, Bopomofo
    (0x31A0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
    (0xFF66, 0xFF9F),  # half-width kana
    (0x20000, 0x323AF),
)
FIRST_WIDE = 0x2E80
ASSIGNED = 0x323B0

EDGES = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
OPENERS = "§%=—–+$£€¥฿₽₴₹₩₺"
HYPHENS = "-–—~"
# Terminal punctuation of the scripts of the world: what UAX 29 calls STerm, and the plain dots.
TERMINALS = (
    "!.?;։؟۔܀܁܂߹।॥၊။።፧፨᙮᜵᜶᠃᠉᥄᥅᪨᪩᪪᪫᭚᭛᭞᭟᰻᰼᱾᱿‼‽⁇⁈⁉⸮⸼꓿꘎꘏꛳꛷꡶꡷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫﹒﹖﹗！．？｡。"
    "།؝؞࠷࠹࠽࠾។៕៖៙៚᭽᭾⹓⹔𐩖𐩗𑁇𑁈𑂾𑂿𑃀𑃁𑅁𑅂𑅃𑇅𑇆𑇍𑇞𑇟𑈸𑈹𑈻𑈼𑊩𑑋𑑌𑗂𑗃𑙁𑙂𑜼𑜽𑜾𑩂𑩃𑪛𑪜𑱁𑱂𖩮𖩯𖫵𖬷𖬸𖭄𛲟𝪈"
).replace(";", "")


@functools.cache
def table() -> Bits:
    """The bits of every code point, (0x110000,)."""
    characters = [chr(code) for code in range(ASSIGNED)]
    category = np.array([unicodedata.category(c) for c in characters])
    major = category.astype("U1")
    bits = np.zeros(sys.maxunicode + 1, np.uint16)
    known = bits[:ASSIGNED]
    known[np.array([c.isalpha() for c in characters])] |= ALPHA
    known[np.array([c.isspace() for c in characters])] |= SPACE
    known[category == "Ll"] |= LOWER
    known[category == "Lu"] |= UPPER
    known[major == "M"] |= MARK
    # Khmer, Thai and Lao may be written with a space of no width between words.
    known[[0x200B, 0x200C, 0x200D, 0x2060]] |= MARK
    known[major == "P"] |= PUNCTUATION
    known[category == "So"] |= ALONE
    known[np.isin(major, ["L", "M", "N"])] |= CONTENT
    known[ord("0") : ord("9") + 1] |= DIGIT
    for first, last in UNSPACED_BLOCKS:
        block = known[first : last + 1]
        block[(block & ALPHA) != 0] |= UNSPACED | (WIDE if first >= FIRST_WIDE else 0)
    _mark(bits, EDGES, EDGE)
    _mark(bits, OPENERS, OPENER)
    _mark(bits, HYPHENS, HYPHEN)
    _mark(bits, TERMINALS, TERMINAL)
    _mark(bits, "\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029", BREAK)
    # Punctuation of full width stands between words that no space parts. The degree sign does not.
    wide = np.r_[0x3000:0x3040, 0xFF00:0xFFF0]
    bits[wide[(bits[wide] & PUNCTUATION) != 0]] |= ALONE
    bits[ord("°")] &= np.uint16(~ALONE & 0xFFFF)
    bits[ord("…")] |= ALONE
    bits.setflags(write=False)
    return bits


@functools.cache
def unreadable() -> NDArray[np.bool_]:
    """Of every code point, whether it is a control (but tab and line ends), a surrogate, of private
    use or not assigned, (0x110000,)."""
    found = np.ones(sys.maxunicode + 1, np.bool_)
    for first, past in ((0, ASSIGNED), (0xE0000, 0xE0200)):
        category = [unicodedata.category(chr(code)) for code in range(first, past)]
        found[first:past] = np.isin(category, ["Cc", "Cs", "Co", "Cn"])
    found[[ord(c) for c in "\t\n\r"]] = False
    found.setflags(write=False)
    return found


@functools.cache
def terminals() -> frozenset[str]:
    """The characters that end a sentence."""
    return frozenset(TERMINALS)


def codes(text: str) -> Codes:
    """Code points, (characters,); a lone surrogate is a code like any other."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _mark(bits: Bits, characters: Iterable[str], bit: int) -> None:
    bits[[ord(c) for c in characters]] |= bit
