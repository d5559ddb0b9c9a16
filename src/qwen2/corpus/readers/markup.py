"""DocBook, Mallard, HTML and their like as Markdown: headings, paragraphs, lists, tables, code.

What is not known as inline, code, list, ... is a paragraph when text stands in it and a container
when not, so that other formats of prose give their paragraphs too.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import Any

from qwen2.common.errors import UserError

SECTIONS = frozenset((
    "page", "book", "part", "chapter", "appendix", "preface", "article", "section", "simplesect",
    "refentry", "refsection", "glossary", "sect1", "sect2", "sect3", "sect4", "sect5", "refsect1",
    "refsect2", "refsect3",
))  # fmt: skip
PARAGRAPHS = frozenset((
    "p", "para", "simpara", "title", "subtitle", "term", "desc", "refname", "refpurpose", "dt",
))  # fmt: skip
CODE = frozenset(("programlisting", "screen", "literallayout", "synopsis", "codeblock", "pre"))
ITEMS = frozenset(("item", "listitem", "step", "li"))
NUMBERED = frozenset(("steps", "orderedlist", "procedure", "ol"))
HEADINGS = {f"h{level}": level for level in range(1, 7)}
ROWS = frozenset(("tr", "row"))
CONTAINERS = frozenset((
    "list", "terms", "itemizedlist", "variablelist", "varlistentry", "simplelist", "segmentedlist",
    "note", "tip", "warning", "caution", "important", "comment", "example", "informalexample",
    "figure", "informalfigure", "table", "informaltable", "tgroup", "thead", "tbody", "tfoot",
    "listing", "quote", "blockquote", "sidebar", "formalpara", "glosslist", "glossentry",
    "glossdef", "abstract", "bridgehead", "refnamediv", "refsynopsisdiv", "qandaset", "qandaentry",
    "question", "answer", "table-wrap", "div", "body", "ul", "dl", "dd", "main", "address",
    "center", "details", "summary", "figcaption", "hr", "caption",
))  # fmt: skip
BLOCKS = SECTIONS.union(PARAGRAPHS, CODE, ITEMS, NUMBERED, ROWS, CONTAINERS, HEADINGS)
LEFT_OUT = frozenset((
    "indexterm", "index", "toc", "remark", "revhistory", "links", "media", "mediaobject",
    "inlinemediaobject", "screenshot", "credit", "license", "shortcut", "anchor", "colspec",
    "glosssee", "glossseealso", "rules", "metadata", "svg",
    "head", "script", "style", "noscript", "template", "nav", "footer", "form", "button",
    "iframe", "object",
))  # fmt: skip
LITERAL = frozenset((
    "code", "cmd", "command", "filename", "file", "literal", "option", "envar", "function",
    "varname", "computeroutput", "userinput", "input", "output", "sys", "systemitem",
))  # fmt: skip
JOINED = {"guiseq": " > ", "menuchoice": " > ", "keyseq": "+", "keycombo": "+"}


def lxml_etree() -> Any:
    """The module lxml.etree.

    Raises:
        UserError: it is not installed.
    """
    try:
        from lxml import etree
    except ImportError:
        raise UserError("reading markup needs lxml: pip install 'qwen2[corpus]'") from None
    return etree


def markdown(root: Any) -> str:
    """The text of an lxml element; empty when there is none."""
    return "\n\n".join(_block(root, 0, None)) + "\n" if _plain(root) else ""


def local(element: Any) -> str:
    """The element's name without its namespace."""
    return str(element.tag).rpartition("}")[2]


def _block(element: Any, depth: int, parent: str | None) -> list[str]:
    """The blocks of an element that begins a line."""
    tag = local(element)
    if tag in LEFT_OUT:
        return []
    if tag.endswith("info"):  # of a book, a page ...: only what it is called
        return [
            b for child in element if local(child) == "title" for b in _block(child, depth, tag)
        ]
    if tag == "title":
        text = _plain(element)
        if parent in SECTIONS or (parent or "").endswith("info"):
            return [f"{'#' * min(max(depth, 1), 6)} {text}"] if text else []
        return [f"**{text}**"] if text else []
    if tag in HEADINGS:
        text = _plain(element)
        return [f"{'#' * HEADINGS[tag]} {text}"] if text else []
    if tag in CODE or (tag == "code" and parent not in PARAGRAPHS and parent not in ITEMS):
        text = textwrap.dedent("".join(element.itertext())).strip("\n")
        return [f"```\n{text}\n```"] if text.strip() else []
    if tag in ("table", "informaltable"):
        return _table(element, depth)
    if tag in SECTIONS:
        depth += 1
    marks = NUMBERED if tag in NUMBERED else None
    blocks: list[str] = []
    run: list[str] = [element.text or ""]

    def end_run() -> None:
        if text := " ".join("".join(run).split()):
            blocks.append(text)
        run.clear()

    is_prose = tag in PARAGRAPHS or _has_text(element) or not _has_blocks(element)
    number = 0
    for child in element:
        name = local(child)
        if name in BLOCKS or not is_prose or name.endswith("info"):
            end_run()
            inner = _block(child, depth, tag)
            if name in ITEMS and inner:
                number += 1
                inner = [_item("\n\n".join(inner), f"{number}. " if marks else "- ")]
            blocks += inner
        elif name not in LEFT_OUT:
            run.append(_inline(child))
        run.append(child.tail or "")
    end_run()
    return blocks


def _item(text: str, mark: str) -> str:
    return mark + textwrap.indent(text, " " * len(mark)).lstrip()


def _table(element: Any, depth: int) -> list[str]:
    """Title and rows, a line each; the first row is the head, as Markdown wants one."""
    blocks = [b for child in element if local(child) == "title" for b in _block(child, depth, "")]
    rows = [
        "| " + " | ".join(_plain(cell).replace("|", "\\|") for cell in row) + " |"
        for row in element.iter()
        if local(row) in ROWS and len(row)
    ]
    if rows:
        columns = max(rows[0].count(" | ") + 1, 1)
        rows.insert(1, "|" + " --- |" * columns)
        blocks.append("\n".join(rows))
    return blocks


def _plain(element: Any) -> str:
    return " ".join(_inside(element).split())


def _inside(element: Any) -> str:
    parts = [element.text or ""]
    for child in element:
        name = local(child)
        if name not in LEFT_OUT:
            parts.append(_inline(child) if name not in BLOCKS else f" {_inside(child)} ")
        parts.append(child.tail or "")
    return "".join(parts)


def _inline(element: Any) -> str:
    tag = local(element)
    if tag in JOINED:
        return JOINED[tag].join(_shown(_plain(c) for c in element if local(c) not in LEFT_OUT))
    text = _inside(element)
    if tag in LITERAL and text.strip() and "`" not in text:
        return f"`{text.strip()}`"
    if tag in ("footnote", "alt"):
        return f" ({' '.join(text.split())})"
    return f"“{text}”" if tag == "quote" else text


def _shown(texts: Iterable[str]) -> list[str]:
    return [text for text in texts if text]


def _has_blocks(element: Any) -> bool:
    """Whether blocks are below; in unknown formats, any element that is no leaf is one."""
    return any(local(child) in BLOCKS or len(child) for child in element)


def _has_text(element: Any) -> bool:
    texts = [element.text, *(child.tail for child in element)]
    return any(text and not text.isspace() for text in texts)
