"""roff's escapes: characters, fonts and strings within a line, and the arguments of a request.

groff_char(7) has the names; what is not known by name is left out with its escape.
"""

from __future__ import annotations

import re

Strings = dict[str, str]

NAMED = {
    "-": "-", "hy": "-", "bu": "•", "aq": "'", "dq": '"', "em": "—", "en": "–", "co": "©",
    "lq": "“", "rq": "”", "oq": "‘", "cq": "’", "rs": "\\", "ti": "~", "ha": "^", "ga": "`",
    "aa": "´", "rg": "®", "tm": "™", "mu": "×", "di": "÷", "+-": "±", "<=": "≤", ">=": "≥",
    "!=": "≠", "->": "→", "<-": "←", "de": "°", "ss": "ß", "at": "@", "sh": "#", "ba": "|",
    "bv": "|", "ul": "_", "sl": "/", "Fo": "«", "Fc": "»", "ci": "○", "sq": "□", "*m": "μ",
    "mc": "µ", "12": "½", "14": "¼", "34": "¾", "Eu": "€", "Po": "£", "ps": "¶", "sc": "§",
    "la": "<", "ra": ">", "lC": "{", "rC": "}", "lB": "[", "rB": "]", "bq": "‚", "Bq": "„",
    "if": "∞", "~~": "≈", "==": "≡", "pl": "+", "mi": "−", "eq": "=", "rn": "‾", "dg": "†",
}  # fmt: skip
# Accents before a letter: ['e] is é.
ACCENTS = {"'": "\u0301", "`": "\u0300", "^": "\u0302", ":": "\u0308", "~": "\u0303",
           ",": "\u0327", "/": "\u0338", "o": "\u030a", "v": "\u030c"}  # fmt: skip
ONE = {" ": " ", "~": " ", "0": " ", "-": "-", "e": "\\", "\\": "\\", "'": "´", "`": "`", ".": ".",
       "t": "\t", "E": "\\"}  # fmt: skip
PREDEFINED = {"Aq": "'", "lq": "“", "rq": "”", "R": "®", "Tm": "™", "L\"": '"', "R\"": '"',
              "C'": "'", "--": "—", "PI": "π", "C`": '"'}  # fmt: skip

ESCAPE = re.compile(
    r"""\\(?:
      (?P<comment>["\#]).* |
      f(?:\[[^]]*\]|\(..|.) | [mMFnVgk](?:\[[^]]*\]|\(..|.) |
      s(?:[-+]?\[[^]]*\]|\([-+]?..|[-+]?\d\d?|'[^']*') |
      [hvwlLDoxXZbzNA]'[^']*' |
      \*(?:\[(?P<string>[^]]*)\]|\((?P<string2>..)|(?P<string1>.)) |
      C'(?P<called>[^']*)' | \[(?P<name>[^]]*)\] | \((?P<name2>..) |
      (?P<one>.)
    )""",
    re.VERBOSE,
)
ARGUMENT = re.compile(r'"(?P<quoted>(?:[^"]|"")*)"?|(?P<plain>(?:\\[ "].?|\S)+)')


def glyphs(line: str, strings: Strings, depth: int = 0) -> str:
    """A line of text with every escape replaced by what it prints."""

    def printed(found: re.Match[str]) -> str:
        string = found["string"] or found["string2"] or found["string1"]
        if string is not None:
            value = strings.get(string, PREDEFINED.get(string, ""))
            return glyphs(value, strings, depth + 1) if depth < 8 else ""  # one may name itself
        name = found["name"] or found["name2"] or found["called"]
        if name is not None:
            return _glyph(name)
        return ONE.get(found["one"] or "", "")

    return ESCAPE.sub(printed, line) if "\\" in line else line


def arguments(text: str, strings: Strings) -> list[str]:
    """The arguments of a request: parted by spaces, quoted ones whole."""
    text = re.sub(r'\s*\\".*', "", text)
    return [
        glyphs(m["plain"] if m["quoted"] is None else m["quoted"].replace('""', '"'), strings)
        for m in ARGUMENT.finditer(text)
    ]


def _glyph(name: str) -> str:
    if name in NAMED:
        return NAMED[name]
    if code := re.fullmatch(r"u([0-9A-F]{4,6})(?:_([0-9A-F]{4,6}))*", name):
        values = [int(part, 16) for part in code[0][1:].split("_")]
        return "".join(map(chr, values)) if all(v < 0x110000 for v in values) else ""
    if len(name) == 2 and name[0] in ACCENTS and name[1].isalpha():
        import unicodedata

        return unicodedata.normalize("NFC", name[1] + ACCENTS[name[0]])
    return ""
