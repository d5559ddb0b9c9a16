"""Write parallel.npz: statistics of translated books beside those of the same text in English.

The books: Debian's handbook, its installation guide, GNOME's help, and a tenth of LibreOffice's
help in the languages that those have little of.
A page has the same blocks in every language, so block i is the translation of block i of the
English page. Blocks that were never translated are left out on both sides; code stays on both.
About 1,500 English characters make a document. Only numbers are written, no text, and of at most
200 documents a language; the limits that it prints, and that `defaults.py` has, are from all.

    apt-get download debian-handbook installation-guide-amd64 gnome-user-docs libreoffice-help-...
    for package in *.deb; do dpkg -x $package FOLDER; done
    python tests/golden/make_parallel.py FOLDER
"""

import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from lxml import etree, html

from qwen2.corpus.filters import TEXT_RULES, calibrate, keep_lines, measure_text, repair
from qwen2.corpus.language import agreement, canonical, identify

HERE = Path(__file__).parent
BOOKS = (  # folder, its English, pages of a language, one page of how many
    ("usr/share/doc/debian-handbook/html", "en-US", "*.html", 1),
    ("usr/share/doc/installation-guide-amd64", "en", "*.html", 1),
    ("usr/share/help", "C", "*/*.page", 1),
    ("usr/share/libreoffice/help", "en-US", "text/**/*.html", 10),
)
LIBREOFFICE = {"et", "eu", "hi", "km", "tr"}
CODE = {"pre", "screen", "code"}
INLINE = {
    "a", "abbr", "acronym", "app", "b", "br", "cite", "cmd", "em", "email", "file", "font", "gui",
    "guiseq", "i", "img", "input", "kbd", "key", "keyseq", "label", "link", "media", "output", "q",
    "samp", "small", "span", "strong", "sub", "sup", "sys", "systemitem", "tt", "u", "var",
}  # fmt: skip
LEFT_OUT = {"aside", "credit", "footer", "header", "head", "info", "script", "style"}
LEFT_OUT_CLASSES = {"docnav", "toc", "navheader", "navfooter"}
CHARACTERS, LEAST_CHARACTERS = 1500, 300
KEPT = 200
Block = tuple[bool, str]  # whether it is code, text
Pair = tuple[str, str]  # English, translated


def main() -> None:
    languages: list[str] = []
    texts: list[str] = []
    pairs: list[Pair] = []
    for folder, original, pattern, every in BOOKS:
        top = Path(sys.argv[1], folder)
        source = pages(top / original, pattern, every)
        for place in sorted(top.iterdir()):
            if place.name == original or not place.is_dir():
                continue
            language = canonical(place.name)
            if "libreoffice" in folder and language not in LIBREOFFICE:
                continue
            for page, translated in pages(place, pattern, every).items():
                if len(translated) != len(source.get(page, [])):
                    continue
                for n, pair in enumerate(documents(source[page], translated, language)):
                    # Else it is code, with headings of the language around it.
                    if (agreement(language, identify(pair[1])) or 0) < 0.5:
                        continue
                    pairs.append(pair)
                    languages.append(language)
                    texts.append(f"{place.name}/{page}/{n}")
            sys.stderr.write(f"{place} {len(pairs)}\n")
    own = statistics([pair[1] for pair in pairs], languages)
    english = statistics([pair[0] for pair in pairs], ["en"] * len(pairs))
    columns = {name: np.concatenate([own[name], english[name]]) for name in own}
    found = calibrate(TEXT_RULES, columns, languages + ["en"] * len(pairs), texts * 2)
    for language, limits in found.languages.items():
        shown = {name: one.model_dump(exclude_none=True) for name, one in limits.items()}
        sys.stdout.write(f"{language} {shown}\n")
    write(own, english, languages)


def write(own: dict, english: dict, languages: list[str]) -> None:
    order = np.random.default_rng(0).permutation(len(languages))
    shuffled = np.array(languages)[order]
    kept = np.sort(np.concatenate([order[shuffled == one][:KEPT] for one in np.unique(shuffled)]))
    np.savez_compressed(
        HERE / "parallel.npz",
        statistics=np.array(list(own)),
        languages=np.array(languages)[kept],
        own=np.stack([own[name][kept] for name in own]).astype(np.float16),
        english=np.stack([english[name][kept] for name in own]).astype(np.float16),
    )


def statistics(texts: list[str], languages: list[str]) -> dict[str, np.ndarray]:
    """C4's of the lines that C4 keeps, all others of the whole text."""
    edited = measure_text(texts, languages, [keep_lines(text) for text in texts])
    whole = measure_text(texts, languages)
    return whole | {name: edited[name] for name in ("sentences", "lorem_ipsum", "curly_brackets")}


def pages(folder: Path, pattern: str, every: int) -> dict[str, list[Block]]:
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.glob(pattern))}
    return {
        name: blocks(path) for name, path in names.items() if zlib.crc32(name.encode()) % every == 0
    }


def blocks(path: Path) -> list[Block]:
    """A page's blocks of text in their order."""
    data = path.read_bytes()
    root = html.fromstring(data).find("body") if path.suffix == ".html" else etree.fromstring(data)
    found: list[Block] = []
    parts: list[str] = []

    def close(code: bool = False) -> None:
        text = "".join(parts)
        text = text.strip("\n") if code else " ".join(text.split())
        parts.clear()
        if text:
            found.append((code, text))

    def walk(node: etree._Element) -> None:
        name = etree.QName(node).localname if isinstance(node.tag, str) else "style"
        classes = set((node.get("class") or "").split()) if name != "style" else set()
        if name in LEFT_OUT or classes & LEFT_OUT_CLASSES:
            return
        code = name in CODE and (name != "code" or "\n" in "".join(node.itertext()))
        block = code or name not in INLINE | {"code"}
        if block:
            close()
        if code:
            parts.append("".join(node.itertext()))
            close(code=True)
            return
        parts.append(node.text or "")
        for child in node:
            walk(child)
            parts.append(child.tail or "")
        if block:
            close()

    walk(root)
    close()
    return found


def documents(source: list[Block], translated: list[Block], language: str) -> Iterator[Pair]:
    """Documents of the same blocks in both languages."""
    parts: list[Pair] = []
    size = 0
    for (code, a), (_, b) in zip(source, translated, strict=True):
        if code or is_translated(a, b, language):
            parts.append((a, b))
            size += 0 if code else len(a)
        if size > CHARACTERS:
            yield joined(parts)
            parts, size = [], 0
    if size > LEAST_CHARACTERS:
        yield joined(parts)


def joined(parts: list[Pair]) -> Pair:
    a, b = zip(*parts, strict=True)
    return repair("\n".join(a)), repair("\n".join(b))


def is_translated(source: str, text: str, language: str) -> bool:
    letters = sum(map(str.isalpha, text))
    if letters < 40:
        return source != text or letters < 16
    return (agreement(language, identify(text)) or 0) > 0.6


if __name__ == "__main__":
    main()
