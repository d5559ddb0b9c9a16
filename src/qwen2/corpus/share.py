"""Text that packages leave on a machine: their documentation and their translated messages.

Found under the share folders of the system and of Python, and in the metadata of installed Python
packages (their README), so that a machine without share/doc has prose too.
"""

from __future__ import annotations

import gettext
import re
from collections.abc import Iterator, Sequence
from email.message import Message
from importlib import metadata
from io import BytesIO
from pathlib import Path
from typing import cast

from qwen2.corpus.documents import Document
from qwen2.corpus.files import Found, Skipped, decode, files_below, read_bytes, sample_order

PROSE = re.compile(r"(?i)(?!changelog)((readme|copyright|news).*|.*\.(txt|md|rst))")
CATALOGUE = re.compile(r"([^/]+)/LC_MESSAGES/([^/]+)\.mo")
MAX_CATALOGUE_BYTES = 8 << 20
MIN_MESSAGE = 40  # bytes of UTF-8 (a dozen Chinese characters); shorter ones are labels of buttons


def prose(shares: Sequence[Path]) -> Iterator[Found]:
    """READMEs of installed Python packages; then README, copyright, NEWS, licences, and .txt, .md
    and .rst files under share/doc, packed by gzip or not.

    Changelogs are left out: two thirds of the bytes of share/doc, and lists of names and numbers.
    """
    yield from _package_readmes()
    licences = files_below([share / "common-licenses" for share in shares])
    documentation = files_below([share / "doc" for share in shares])
    files = {f"common-licenses/{name}": path for name, path in licences.items()} | {
        f"doc/{name}": path
        for name, path in documentation.items()
        if PROSE.fullmatch(path.name.removesuffix(".gz"))
    }
    for name in sample_order(files):
        path = files[name]
        data = read_bytes(path)
        if data is None:
            yield Skipped("prose", "unreadable or longer than 1 MiB", str(path))
        elif (text := decode(data)) is None:
            yield Skipped("prose", "not UTF-8 text", str(path))
        else:
            yield Document(text, f"prose/{name}", str(path), "prose")


def multilingual(shares: Sequence[Path]) -> Iterator[Found]:
    """One document for each catalogue of translated messages (share/locale/LANGUAGE/*.mo).

    Only the translations, one a line or paragraph, and only those that say something. The same
    catalogue in all languages is one group: pt and pt_BR share sentences.
    """
    files = files_below([share / "locale" for share in shares])
    for name in sample_order(files):
        match = CATALOGUE.fullmatch(name)
        if match is None or match[1].partition("_")[0].partition("@")[0] == "en":
            continue
        language, domain = match.groups()
        path = files[name]
        messages = _messages(read_bytes(path, MAX_CATALOGUE_BYTES))
        if messages is None:
            yield Skipped("multilingual", "not a readable catalogue", str(path))
        else:
            yield Document(
                "\n".join(messages),
                f"multilingual/{language}/{domain}",
                str(path),
                "multilingual",
                language=language,
                group=f"messages/{domain}",
            )


def _package_readmes() -> Iterator[Found]:
    packages = {package.name: package for package in metadata.distributions() if package.name}
    for name in sample_order(packages):
        message = cast(Message, packages[name].metadata)
        text = message.get_payload()
        licence = message["License-Expression"]
        if isinstance(text, str) and text.strip():
            identity, source = f"prose/packages/{name}", f"{name}.dist-info/METADATA"
            yield Document(text, identity, source, "prose", licence, group=f"packages/{name}")


def _messages(data: bytes | None) -> list[str] | None:
    """The translations of a catalogue that are longer than a label, each once, in its order."""
    if data is None:
        return None
    try:
        # The only way to all messages in the standard library; the name is as old as the class.
        catalogue = vars(gettext.GNUTranslations(BytesIO(data)))["_catalog"]
    except Exception:  # a damaged catalogue raises whatever struct, codecs or slicing do
        return None
    kept: dict[str, None] = {}
    for original, message in catalogue.items():
        translation = message.strip()
        english = original[0] if isinstance(original, tuple) else original
        translated = english and translation != english.rpartition("\x04")[2].strip()
        if translated and len(translation.encode()) >= MIN_MESSAGE:
            kept[translation] = None
    return list(kept)
