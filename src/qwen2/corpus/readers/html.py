"""HTML: the main text of pages, by trafilatura (Apache-2.0; tested with 2.3.1).

The text is Markdown: headings, lists, tables and code blocks stay what they are; menus, headers and
footers, comments, links' addresses and images go. Nothing is fetched. `favour` chooses between
missing text and letting menus in. `balanced`, `precision` and `recall` are trafilatura's. They are
made for news and blogs: of some manuals they lose all headings, or a third of the text. For trees
of documentation there is `everything`: all but what the page's own markup calls navigation, by
`markup`.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from html import unescape
from typing import Any, ClassVar, Literal

from pydantic import Field

from qwen2.common.errors import UserError
from qwen2.corpus.files import Found
from qwen2.corpus.readers.base import FileReader, Split
from qwen2.corpus.readers.markup import lxml_etree, markdown
from qwen2.corpus.readers.places import Place
from qwen2.corpus.readers.streams import FileError, read_whole

Favour = Literal["balanced", "precision", "recall", "everything"]
MAX_PAGE = 2 << 20  # bytes; time and memory grow with the tree, and larger pages are tables
DECLARED = re.compile(rb"""(?i)<meta[^>]{0,200}?charset\s*=\s*["']?\s*([\w:.-]+)""")
DECLARED_WITHIN = 4096  # bytes of a page that say what its encoding is
TITLE = re.compile(r"(?is)<title[^>]*>([^<]{1,1000})</title>")
# Signs that Sphinx and others set behind a heading or a term, as a link to it.
PERMALINK = re.compile(r"(?m)(?:(?<=\S)[ \t]*¶|(?<=^#)(#* .*\S)[ \t]*#)$")
NAVIGATION = frozenset(("navigation", "search", "banner", "contentinfo"))  # roles
NAVIGATION_CLASS = re.compile(
    r"(?:^|[\s_-])(?:nav\w*|toc|breadcrumbs?|sphinxsidebar\w*|related|headerlink|docnav|footer)"
    r"(?:$|[\s_-])"
)
GUESSED_WITHIN = 1 << 16  # bytes from which an undeclared encoding is guessed


class PageReader(FileReader):
    """A source of pages."""

    favour: Favour = "balanced"
    max_bytes: int = Field(default=MAX_PAGE, gt=0)
    """Of one page as it is stored (unpacked) and of its text."""

    def page(
        self,
        place: Place,
        data: bytes,
        charset: str | None,
        record: str = "",
        where: str = "",
        **metadata: str,
    ) -> Found:
        """The document of a page, or why there is none.

        Args:
            charset: what the server said.
        """
        html = decode_page(data, charset)
        try:
            text = all_text(html) if self.favour == "everything" else main_text(html, self.favour)
        except FileError as damage:
            return self.skipped(place, damage.reason, where, html)
        if text is None:
            return self.skipped(place, "no main text in the page", where, html)
        title = TITLE.search(html[:100_000])
        if title:
            metadata["title"] = " ".join(unescape(title[1]).split())
        return self.document(place, text, record, where, metadata=metadata)


class HtmlSource(PageReader):
    """HTML files below folders."""

    format: Literal["html"]

    SUFFIXES: ClassVar[tuple[str, ...]] = (".html", ".htm", ".xhtml")
    LEFT_OUT: ClassVar[frozenset[str]] = frozenset({"_static", "_sources", "_images"})

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        yield self.page(place, read_whole(place.url, self.max_bytes), None)


def main_text(html: str, favour: Favour) -> str | None:
    """The main text of a page as Markdown; None when there is nothing but menus and the like.

    Raises:
        FileError: trafilatura broke on the page.
        UserError: trafilatura is not installed.
    """
    trafilatura = _trafilatura()
    try:
        text: str | None = trafilatura.extract(
            html,
            output_format="markdown",
            include_comments=False,
            include_tables=True,
            favor_precision=favour == "precision",
            favor_recall=favour == "recall",
        )
    except Exception as error:  # whatever a library does with the web's worst
        raise FileError(f"trafilatura failed: {type(error).__name__}") from None
    return PERMALINK.sub(r"\1", text) if text else None


def all_text(html: str) -> str | None:
    """The text of a page without its navigation, as Markdown; None when there is none.

    Raises:
        FileError: the page is no HTML at all.
        UserError: lxml is not installed.
    """
    etree = lxml_etree()
    parser = etree.HTMLParser(
        encoding="utf-8", remove_comments=True, remove_pis=True, no_network=True
    )
    try:
        tree = etree.fromstring(html.encode("utf-8", "replace"), parser)
    except etree.LxmlError as error:
        raise FileError(f"not HTML: {type(error).__name__}") from None
    if tree is None:
        return None
    for element in tree.xpath("//*[@class or @id or @role or @aria-hidden]"):
        name = f"{element.get('class', '')} {element.get('id', '')}"
        by_role = element.get("role") in NAVIGATION or element.get("aria-hidden") == "true"
        if by_role or NAVIGATION_CLASS.search(name):
            tail = element.tail
            element.clear()
            element.tag, element.tail = "nav", tail
    return markdown(tree) or None


def decode_page(data: bytes, charset: str | None) -> str:
    """The page as text: by its BOM, as UTF-8, by what the server or the page says, or by guess.

    UTF-8 goes before what is declared: few texts in other encodings are valid UTF-8, and many
    pages declare an encoding that they are not in. What cannot be decoded becomes U+FFFD.
    """
    declared = DECLARED.search(data[:DECLARED_WITHIN])
    said = [charset, declared[1].decode("ascii") if declared else None]
    names = [name.lower() for name in said if name]
    seven_bits = any(name.startswith("iso-2022") for name in names)  # valid UTF-8, and no text
    for name in [*names, "utf-8-sig"] if seven_bits else ["utf-8-sig", *names]:
        try:
            # Browsers read Latin-1 as its superset.
            return data.decode("cp1252" if name in ("iso-8859-1", "latin-1", "latin1") else name)
        except (UnicodeDecodeError, LookupError):
            continue
    return data.decode(_guessed(data), "replace")


def _guessed(data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    _trafilatura()
    from charset_normalizer import from_bytes  # comes with trafilatura

    best = from_bytes(data[:GUESSED_WITHIN]).best()
    return best.encoding if best else "utf-8"


def _trafilatura() -> Any:
    try:
        import trafilatura
    except ImportError:
        raise UserError("reading HTML needs trafilatura: pip install 'qwen2[corpus]'") from None
    return trafilatura
