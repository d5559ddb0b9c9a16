"""The tokenizer, its oracles, and real text that every machine with Python has."""

from __future__ import annotations

import ast
import base64
import gettext
import sys
import sysconfig
import unicodedata
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from pydoc_data import topics
from typing import Any

import pytest
import tiktoken

from qwen2.tokenizer import Tokenizer

LONGEST = 20_000  # characters of a document
CATALOGUES = 3  # message catalogues of each language
EXTRA_TOKENS = (  # what Qwen2.5 added, ids 151646 to 151664
    *("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>"),
    *("<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
    *("<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)


@pytest.fixture(scope="session")
def qwen() -> Tokenizer:
    return Tokenizer.qwen2()


@pytest.fixture(scope="session")
def extended(qwen: Tokenizer) -> Tokenizer:
    """The vocabulary as Qwen2.5's checkpoints carry it, for an instruct model."""
    extra = {token: 151646 + i for i, token in enumerate(EXTRA_TOKENS)}
    return Tokenizer(
        qwen.ranks,
        {**qwen.special_tokens, **extra},
        chat_template=qwen.chat_template,
        eos_token="<|im_end|>",
        user_defined=frozenset({"<tool_call>", "</tool_call>"}),
    )


@pytest.fixture(scope="session")
def saved(qwen: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen2")
    qwen.save(folder)
    return folder


@pytest.fixture(scope="session")
def tiktoken_oracle() -> tiktoken.Encoding:
    """An Encoding straight from the file, by the published expression."""
    lines = (resources.files("qwen2.tokenizer") / "data/qwen.tiktoken").read_bytes().splitlines()
    return tiktoken.Encoding(
        "oracle",
        pat_str=(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
            r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        ),
        mergeable_ranks={base64.b64decode(t): int(r) for t, r in map(bytes.split, lines)},
        special_tokens={"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645},
    )


@pytest.fixture(scope="session")
def huggingface(saved: Path) -> Any:
    """transformers' tokenizer of the folder that we saved."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(saved)


@pytest.fixture(scope="session")
def real_fields(real_checkpoint: Path) -> dict[str, Any]:
    """What the real checkpoint's GGUF file says of its tokenizer."""
    import gguf

    fields = gguf.GGUFReader(real_checkpoint).fields
    return {name: fields[name].contents() for name in fields if name.startswith("tokenizer.")}


@pytest.fixture(scope="session")
def documents() -> list[str]:
    """Distinct documents: the standard library's functions, help topics, the characters of all
    scripts with their names, and messages in whatever languages are installed."""
    found = [*_functions(), *topics.topics.values(), *_characters(), *_messages()]
    return list(dict.fromkeys(text[:LONGEST] for text in found))


def _functions() -> Iterator[str]:
    """The source of each function and method."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "dist-packages", "test", "tests", "idlelib"} & set(path.parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(text)
        except (UnicodeDecodeError, SyntaxError):
            continue
        lines = text.splitlines(keepends=True)
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        for node in [*tree.body, *(member for c in classes for member in c.body)]:
            if isinstance(node, ast.FunctionDef):
                yield "".join(lines[node.lineno - 1 : node.end_lineno])


def _characters() -> Iterator[str]:
    """Every 64 assigned characters, each with its name."""
    characters = [chr(c) for c in range(sys.maxunicode + 1) if unicodedata.name(chr(c), "")]
    lines = [f"{c}\t{unicodedata.name(c).capitalize()}" for c in characters]
    for i in range(0, len(lines), 64):
        yield "\n".join(lines[i : i + 64])


def _messages() -> Iterator[str]:
    """Translations of programs, one document a catalogue."""
    for folder in sorted(Path("/usr/share/locale").glob("*/LC_MESSAGES")):
        for path in sorted(folder.glob("*.mo"))[:CATALOGUES]:
            try:
                with path.open("rb") as file:
                    catalogue: dict[Any, str] = vars(gettext.GNUTranslations(file))["_catalog"]
            except (OSError, ValueError, IndexError):
                continue
            yield "\n".join(catalogue.values())
