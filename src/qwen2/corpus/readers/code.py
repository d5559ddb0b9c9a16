"""Trees of source code: a file is a document, its programming language goes into the metadata.

The licence is what the file's first lines say by SPDX; else what LICENSE or COPYING says in the
nearest folder above it, as `filters.code.licence` reads it; else that of the source. Hidden folders
and those of code that was copied in or built (node_modules, vendor ...) are not entered.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import ClassVar, Literal

from qwen2.corpus.files import Found
from qwen2.corpus.filters.code import HEAD, SPDX, licence
from qwen2.corpus.readers.base import FileReader, Split
from qwen2.corpus.readers.places import Place, file_system
from qwen2.corpus.readers.streams import FileError, read_whole, unpacked_name
from qwen2.corpus.readers.text import read_text

LANGUAGES = {
    "ada": ".adb .ads", "assembly": ".asm .s", "awk": ".awk", "c": ".c .h",
    "c#": ".cs", "c++": ".cc .cpp .cxx .hh .hpp .hxx", "clojure": ".clj .cljs", "cmake": ".cmake",
    "css": ".css .scss .less", "cuda": ".cu .cuh", "dart": ".dart", "elixir": ".ex .exs",
    "elm": ".elm", "erlang": ".erl .hrl", "f#": ".fs .fsx", "fortran": ".f .f90 .f95 .for",
    "go": ".go", "groovy": ".groovy .gradle", "haskell": ".hs .lhs", "java": ".java",
    "javascript": ".js .jsx .mjs .cjs", "julia": ".jl", "kotlin": ".kt .kts", "lean": ".lean",
    "lisp": ".lisp .cl .el", "lua": ".lua", "matlab": ".m", "nix": ".nix", "ocaml": ".ml .mli",
    "pascal": ".pas .pp", "perl": ".pl .pm", "php": ".php", "powershell": ".ps1", "prolog": ".pro",
    "protobuf": ".proto", "python": ".py .pyi .pyx", "r": ".r", "ruby": ".rb", "rust": ".rs",
    "scala": ".scala .sbt", "scheme": ".scm .rkt", "shell": ".sh .bash .zsh", "solidity": ".sol",
    "sql": ".sql", "swift": ".swift", "tcl": ".tcl", "tex": ".tex .sty .cls",
    "typescript": ".ts .tsx", "verilog": ".v .sv", "vhdl": ".vhd .vhdl", "vim": ".vim",
    "zig": ".zig",
}  # fmt: skip
BY_SUFFIX = {suffix: name for name, suffixes in LANGUAGES.items() for suffix in suffixes.split()}
BY_NAME = {
    "makefile": "make", "dockerfile": "docker", "cmakelists.txt": "cmake", "rakefile": "ruby",
}  # fmt: skip
LICENCE_FILE = re.compile(r"(?i)(?:licen[sc]e|copying|unlicense)(?:[.-][\w.-]*)?")
MAX_LICENCE = 1 << 20


class CodeSource(FileReader):
    """Files of source code below folders."""

    format: Literal["code"]
    max_bytes: int = 1 << 20
    """Of one file; longer ones are data or generated."""
    programming_languages: tuple[str, ...] | None = None
    """Those that are taken; None: all that are known."""

    LEFT_OUT: ClassVar[frozenset[str]] = frozenset((
        "node_modules", "bower_components", "vendor", "vendored", "third_party", "third-party",
        "thirdparty", "external", "extern", "deps", "site-packages", "dist-packages", "__pycache__",
        "build", "dist", "target", "out", "bin", "obj",
    ))  # fmt: skip

    def _wants(self, name: str) -> bool:
        language = programming_language(name)
        wanted = self.programming_languages
        return language is not None and (wanted is None or language in wanted)

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        text = read_text(self, place)
        if not isinstance(text, str):
            yield text
            return
        stated = SPDX.search(text[:HEAD])
        own = licence(text) if stated else _licence_above(*_folders(place))
        metadata = {"path": place.name}
        if language := programming_language(place.name):
            metadata["programming_language"] = language
        yield self.document(place, text, licence=own, metadata=metadata)


def programming_language(name: str) -> str | None:
    """The language of a file by its name, if it is known."""
    last = unpacked_name(name).rpartition("/")[2].lower()
    return BY_NAME.get(last) or BY_SUFFIX.get("." + last.rpartition(".")[2])


def _folders(place: Place) -> tuple[str, str]:
    """The folder of a file, and that of its tree."""
    return place.url.rpartition("/")[0], place.url.removesuffix(place.name).rstrip("/")


@functools.lru_cache(maxsize=4096)
def _licence_above(folder: str, tree: str) -> str | None:
    """What the nearest licence file says, in `folder` or above it up to `tree`."""
    fs, path = file_system(folder)
    names = sorted(name.rpartition("/")[2] for name in fs.ls(path, detail=False))
    for name in names:
        if LICENCE_FILE.fullmatch(name):
            try:
                text = read_whole(f"{folder}/{name}", MAX_LICENCE).decode("utf-8", "replace")
            except FileError:
                continue
            if found := licence(text):
                return found
    above = folder.rpartition("/")[0]
    return _licence_above(above, tree) if len(above) >= len(tree) and folder != tree else None
