"""XML of prose: Mallard pages (.page), DocBook (.docbook, .xml), and what is like them.

Entities that the file or a .dtd or .ent file in its folder defines are put in, as far as
`max_bytes` allows; nothing else is ever opened for a file, neither on the disk nor on a network.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from html.entities import html5
from typing import Any, ClassVar, Literal

from qwen2.corpus.files import Found
from qwen2.corpus.readers.base import FileReader, Split
from qwen2.corpus.readers.markup import lxml_etree, markdown
from qwen2.corpus.readers.places import Place, file_system
from qwen2.corpus.readers.streams import FileError, read_whole

DECLARATION = re.compile(r"\A\s*<\?xml[^>]*\?>")
ENCODING = re.compile(rb"""\A\s*<\?xml[^>]{0,200}?encoding\s*=\s*["']([\w.:-]+)""")
DOCTYPE = re.compile(r"<!DOCTYPE[^\[>]*(\[.*?\]\s*)?>", re.DOTALL)
ENTITY = re.compile(r"""<!ENTITY\s+([\w.:-]+)\s+(?:"([^"]*)"|'([^']*)')\s*>""")
REFERENCE = re.compile(r"&([A-Za-z_][\w.:-]*);")
CDATA = re.compile(r"(<!\[CDATA\[.*?\]\]>)", re.DOTALL)
OWN = frozenset(("amp", "lt", "gt", "quot", "apos"))
NESTED = 8  # entities within entities
MAX_DTD = 1 << 20
LANG = ("{http://www.w3.org/XML/1998/namespace}lang", "lang")


class XmlSource(FileReader):
    """XML files below folders."""

    format: Literal["xml"]

    SUFFIXES: ClassVar[tuple[str, ...]] = (".page", ".docbook", ".xml")

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        data = read_whole(place.url, self.max_bytes)
        said = ENCODING.match(data)
        try:
            text = data.decode(said[1].decode() if said else "utf-8").removeprefix("\ufeff")
        except (UnicodeDecodeError, LookupError):
            yield self.skipped(place, "not in the encoding that it declares", "", data)
            return
        root, reason = _parsed(_expanded(text, place.url, self.max_bytes))
        if root is None:
            yield self.skipped(place, "not well-formed XML", f", {reason}", data)
            return
        language = next((root.get(name) for name in LANG if root.get(name)), None)
        yield self.document(place, markdown(root), language=place.language or language)


def _parsed(text: str) -> tuple[Any, str]:
    """The root element; or None and what is wrong."""
    etree = lxml_etree()
    parser = etree.XMLParser(
        resolve_entities=False, no_network=True, load_dtd=False, remove_comments=True,
        remove_pis=True, strip_cdata=True,
    )  # fmt: skip
    try:
        return etree.fromstring(text.encode(), parser), ""
    except (etree.XMLSyntaxError, ValueError) as error:
        return None, str(error).rpartition(", ")[2] if "line" in str(error) else str(error)


def _expanded(text: str, url: str, limit: int) -> str:
    """The document without its document type, and with its entities put in.

    Raises:
        FileError: it becomes longer than `limit` characters.
    """
    text = DECLARATION.sub("", text, count=1)
    doctype = DOCTYPE.search(text)
    own = _entities(doctype.group()) if doctype else {}
    if doctype:
        text = text[: doctype.start()] + text[doctype.end() :]
    for _ in range(NESTED):
        names = set(REFERENCE.findall(text)) - OWN
        if not names:
            break
        known = {**_of_folder(url.rpartition("/")[0]), **own}
        text = _put_in(text, known, limit)
    # What nests deeper, or in itself, stays readable, and well-formed.
    pieces = CDATA.split(text)
    pieces[::2] = [REFERENCE.sub(_as_written, piece) for piece in pieces[::2]]
    return "".join(pieces)


def _as_written(match: re.Match[str]) -> str:
    return match[0] if match[1] in OWN else f"&amp;{match[1]};"


def _put_in(text: str, known: Mapping[str, str], limit: int) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name in OWN:
            return match[0]
        return known.get(name) or html5.get(f"{name};") or _as_written(match)

    pieces = CDATA.split(text)
    size = len(text) + sum(
        len(value(match)) for piece in pieces[::2] for match in REFERENCE.finditer(piece)
    )
    if size > limit:
        raise FileError(f"longer than {limit} bytes")
    pieces[::2] = [REFERENCE.sub(value, piece) for piece in pieces[::2]]
    return "".join(pieces)


def _entities(text: str) -> dict[str, str]:
    """Name -> value of the entities that a DTD defines; the first definition holds."""
    found: dict[str, str] = {}
    for name, double, single in ENTITY.findall(text):
        found.setdefault(name, double or single)
    return found


@functools.lru_cache(maxsize=64)
def _of_folder(folder: str) -> dict[str, str]:
    """The entities of the .dtd and .ent files in a folder."""
    fs, path = file_system(folder)
    found: dict[str, str] = {}
    for name in sorted(fs.ls(path, detail=False)):
        if name.endswith((".dtd", ".ent")):
            url = f"{folder}/{name.rpartition('/')[2]}"
            try:
                text = read_whole(url, MAX_DTD).decode("utf-8", "replace")
            except FileError:
                continue  # its entities stay as they are written
            found = {**_entities(text), **found}
    return found
