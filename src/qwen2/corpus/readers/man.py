"""Manual pages as text: roff with the macros of man(7), mdoc(7) and pod2man.

Not a typesetter: paragraphs come out filled, one line each, sections under their titles, what a tag
tells of indented below it, examples and tables line by line. Fonts, sizes and motions go. Of
conditions, those that hold for a terminal (`n`) are followed; macros that a page defines for itself
are skipped, and its strings (`.ds`) put in. The text is the page's alone: no header, no footer, and
a page that only points to another (`.so`) has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from qwen2.corpus.readers.roff import Strings, arguments, glyphs

SECTIONS = frozenset({"SH", "SS", "Sh", "Ss"})
PARAGRAPHS = frozenset(
    ("PP", "P", "LP", "sp", "Pp", "HP", "br", "RS", "RE", "TQ", "Sp", "Bl", "El", "Bd", "Ed", "in",
     "ti", "YS", "SY", "Rs", "Re", "ce", "bp", "Lp")
)  # fmt: skip
VERBATIM = {"nf": True, "EX": True, "Vb": True, "fi": False, "EE": False, "Ve": False}
FONTS = frozenset({"B", "I", "R", "SM", "SB", "CW"})
ALTERNATING = frozenset({"BR", "RB", "IR", "RI", "BI", "IB"})
# mdoc: what is put around the arguments of a macro.
AROUND = {
    "Op": "[]", "Oo": "[]", "Bq": "[]", "Dq": "“”", "Sq": "‘’", "Ql": "‘’", "Qq": '""', "Pq": "()",
    "Aq": "<>", "Brq": "{}", "Fl": ("-", ""), "Cm": ("", ""), "Fn": ("", "()"),
}  # fmt: skip
PLAIN = frozenset(
    ("Ar", "Pa", "Ic", "Em", "Li", "Dv", "Va", "Ft", "Fa", "Sy", "Tn", "Ev", "Er", "Ad",
     "An", "No", "Nd", "In", "Lk", "Mt", "Vt", "Ms", "Cd", "Fd", "Fo", "Ux", "Bx", "At",
     "Nx", "Ox", "Fx", "St", "Rv", "Lb", "Qo", "Qc", "Oc", "Po", "Pc", "Ao", "Ac", "Do",
     "Dc", "So", "Sc", "Bo", "Bc", "Eo", "Ec", "Xo", "D1", "Dl", "%A", "%B", "%D", "%T",
     "%J", "%N", "%O")
)  # fmt: skip
CALLABLE = AROUND.keys() | PLAIN | {"Nm", "Xr", "Ns"}
CLOSING = frozenset(".,:;)]?!")

BLOCK = re.compile(r"[.']\s*(?:if|ie|el)\b.*\\\{")
# A macro, or what is to be ignored; and the line that ends it, if not `..`.
DEFINITION = re.compile(r"[.']\s*(?:(?:de1?|am1?)\b\s*\S*|ig\b)\s*(\S*)")
# Letters between which a line end is no space.
WIDE = re.compile("[\u2e80-\ua4cf\uac00-\ud7a3\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef]")
HANGUL = re.compile("[\uac00-\ud7a3]")


def man_text(data: str) -> str:
    """The text of a manual page in roff; empty when it has none of its own."""
    page = _Page()
    for line in _followed(data.replace("\\\n", "").split("\n")):
        page.take(line)
    page.end_paragraph()
    text = "\n".join(page.lines)
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n" if text.strip() else ""


def _followed(lines: list[str]) -> Iterator[str]:
    """The lines that a terminal gets to see: without definitions and the other conditions."""
    until, depth, last_held = "", 0, False
    for line in lines:
        if until:
            until = "" if line.rstrip() == until else until
        elif depth:
            depth += len(BLOCK.findall(line)) - line.count("\\}")
        elif request := DEFINITION.match(line.partition('\\"')[0]):
            until = "." + (request[1] or ".")
        elif condition := re.match(r"[.']\s*(if|ie|el)\b\s*(.*)", line):
            held, rest = _holds(condition[1], condition[2], last_held)
            last_held = held
            if held:
                yield rest.removeprefix("\\{").removeprefix("\\").strip()
            elif BLOCK.match(line):
                depth = 1 - line.count("\\}")
        elif not re.match(r"[.']\s*\\\}", line):
            yield line


def _holds(request: str, rest: str, last: bool) -> tuple[bool, str]:
    """Whether a terminal follows this condition, and what stands behind it."""
    if request == "el":
        return not last, rest
    return rest[:2].strip() == "n" or rest.startswith(("!t", "!'")), rest[2:].lstrip(" t")


class _Page:
    """What has been read of a page so far."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.strings: Strings = {}
        self._words: list[str] = []
        self._verbatim = self._tag_follows = self._below_tag = False
        self._table: list[str] | None = None
        self._name = ""

    def take(self, line: str) -> None:
        """One line of roff."""
        if self._table is not None:
            self._row(line)
        elif line[:1] in (".", "'") and (request := re.match(r".\s*(\S+)\s*(.*)", line)):
            self._request(request[1], request[2])
        elif line[:1] in (".", "'") and not line[1:].strip():
            return
        elif line.strip() or self._verbatim:
            self._add(glyphs(line, self.strings))
        else:
            self.end_paragraph()

    def end_paragraph(self) -> None:
        """What was gathered becomes a line, or several where lines are kept."""
        words, self._words = self._words, []
        if not any(map(str.strip, words)):
            return
        indent = "    " * self._below_tag
        if self._verbatim:
            self.lines += [indent + word for word in words] + [""]
        else:
            self.lines += [indent + filled(words), ""]

    def _add(self, text: str) -> None:
        self._words.append(text if self._verbatim else text.strip())
        if self._tag_follows:
            self._end_tag()

    def _end_tag(self) -> None:
        self._tag_follows = self._below_tag = False
        self.end_paragraph()
        if self.lines[-1:] == [""]:
            self.lines.pop()  # what the tag means stands right below it
        self._below_tag = True

    def _request(self, name: str, rest: str) -> None:
        if name.startswith('\\"') or name in ("TH", "Dd", "Dt", "Os", "so"):
            return
        words = arguments(rest, self.strings)
        if name in SECTIONS:
            self._paragraph()
            self.lines += ["", " ".join(words), ""] if words else []
        elif name in ("TP", "TQ"):
            self._paragraph()
            self._tag_follows = True
        elif name in ("IP", "It"):
            self._paragraph()
            if tag := _mdoc(words, self._name) if name == "It" else "".join(words[:1]):
                self._words.append(tag)
                self._end_tag()
        elif name in PARAGRAPHS:
            below = self._below_tag and name in ("br", "sp", "RS", "Bl", "Bd")
            self._paragraph()
            self._below_tag = below
            if name == "Bd":
                self._verbatim = bool({"-literal", "-unfilled"} & set(words))
            elif name == "Ed":
                self._verbatim = False
        elif name in VERBATIM:
            self.end_paragraph()
            self._verbatim = VERBATIM[name]
        elif name == "TS":
            self.end_paragraph()
            self._table = []
        elif name == "ds" and rest:
            key, _, value = rest.partition(" ")
            self.strings[key] = value.strip().removeprefix('"')
        elif name in FONTS and words:
            self._add(" ".join(words))
        elif name in ALTERNATING:
            self._add("".join(words))
        elif name in ("UR", "URL", "MT"):
            self._add(" ".join(words[1:2] + words[:1] if name == "URL" else words[:1]))
        elif name in CALLABLE:
            self._name = self._name or (words[0] if name == "Nm" and words else "")
            self._add(_mdoc([name, *words], self._name))

    def _paragraph(self) -> None:
        self.end_paragraph()
        self._below_tag = self._tag_follows = False

    def _row(self, line: str) -> None:
        """A line of a table: its format comes before it, up to a line that ends in a dot."""
        assert self._table is not None
        if line.startswith(".TE"):
            self.lines += [*self._table[1:], ""]
            self._table = None
        elif not self._table:
            if line.rstrip().endswith("."):
                self._table.append("")  # from here on rows
        elif line.startswith(".T&"):
            self._table.append("")
        elif not line.startswith((".", "'")) and line.strip("_=- \t"):
            cells = line.replace("T{", "").replace("T}", "")
            if cells.strip():
                self._table.append(glyphs(cells, self.strings).strip())


def filled(words: list[str]) -> str:
    """Lines as one; between two letters of a script without spaces nothing is put."""
    text = ""
    for word in words:
        joined = text and word and WIDE.match(text[-1]) and WIDE.match(word[0])
        korean = text and word and (HANGUL.match(text[-1]) or HANGUL.match(word[0]))
        text += ("" if not text or (joined and not korean) else " ") + word
    return text


def _mdoc(words: list[str], page: str) -> str:
    """Arguments of mdoc, macros among them."""
    parts: list[str] = []
    glue = False
    at = 0
    while at < len(words):
        word = words[at]
        at += 1
        if word == "Ns":
            glue = True
            continue
        text, at = _called(words, word, at, page) if word in CALLABLE else (word, at)
        if parts and (glue or text in CLOSING):
            parts[-1] += text
        elif text:
            parts.append(text)
        glue = False
    return " ".join(parts)


def _called(words: list[str], name: str, at: int, page: str) -> tuple[str, int]:
    """What the macro `name` makes of the words from `at`, and where the next is."""
    end = at
    while end < len(words) and words[end] not in CALLABLE and words[end] not in CLOSING:
        end += 1
    own = words[at:end]
    if name == "Xr":
        return (f"{own[0]}({own[1]})" if len(own) > 1 else "".join(own)), at + min(len(own), 2)
    if name == "Nm" and not own:
        return page, end
    if name not in AROUND:
        return " ".join(own), end
    left, right = AROUND[name]
    if name in ("Fl", "Cm", "Fn"):
        return (" ".join(left + word for word in own) or left) + right, end
    while end < len(words) and words[end] not in CLOSING:  # to the end of the line
        end += 1
    return left + _mdoc(words[at:end], page) + right, end
