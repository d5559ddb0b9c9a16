"""How well tokenizers compress text: bytes per token, by language.

Section 2.1 of the report credits the vocabulary with better compression than its alternatives over
many languages; this measures it against whatever tokenizers are given.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import tiktoken
import tokenizers

from qwen2.common.errors import UserError
from qwen2.common.progress import say
from qwen2.tokenizer.tokenizer import PRE_TOKENS, Tokenizer
from qwen2.tokenizer.vocabulary import parse_tiktoken


class BatchEncoder(Protocol):
    """What is asked of a tokenizer here: ours, or another behind `open_tokenizer`."""

    def encode_batch(self, texts: list[str], /) -> Sequence[Sequence[int]]: ...


def bytes_per_token(tokenizer: BatchEncoder, texts: Iterable[str]) -> float:
    """UTF-8 bytes of `texts` over the tokens that `tokenizer` makes of them.

    Raises:
        UserError: the texts are empty.
    """
    texts = list(texts)
    size = sum(len(text.encode(errors="replace")) for text in texts)
    if not size:
        raise UserError("no text: nothing to measure")
    return size / sum(map(len, tokenizer.encode_batch(texts)))


def compare(
    encoders: Mapping[str, BatchEncoder], texts_of: Mapping[str, list[str]]
) -> dict[str, dict[str, float]]:
    """Bytes per token of each encoder for each language: {language: {encoder: figure}}."""
    return {
        language: {name: bytes_per_token(encoder, texts) for name, encoder in encoders.items()}
        for language, texts in texts_of.items()
    }


def open_tokenizer(name: str) -> BatchEncoder:
    """A tokenizer by name.

    Args:
        name: a folder with tokenizer.json, or with vocab.json and merges.txt of Qwen2's kind; a
            .json file as tokenizer.json; a .tiktoken file, read with Qwen2's expression; or a name
            that tiktoken knows.

    Raises:
        UserError: nothing of that name, or it cannot be read.
    """
    path = Path(name)
    if path.is_dir() and not (path / "tokenizer.json").exists():
        return Tokenizer.load(path)
    if path.is_dir() or path.suffix == ".json":
        return _HuggingFace(path / "tokenizer.json" if path.is_dir() else path)
    if path.suffix == ".tiktoken":
        try:
            ranks = parse_tiktoken(path.read_bytes(), name)
        except OSError as error:
            raise UserError(f"{name}: cannot be read: {error.strerror}") from None
        return _Tiktoken(
            tiktoken.Encoding(name, pat_str=PRE_TOKENS, mergeable_ranks=ranks, special_tokens={})
        )
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"tokenizer {name!r}: neither a folder, a file, nor one of {known}")
    try:
        return _Tiktoken(tiktoken.get_encoding(name))
    except OSError as error:  # requests' errors are OSErrors
        raise UserError(
            f"tokenizer {name!r}: tiktoken has to download it and could not "
            f"({type(error).__name__}); set TIKTOKEN_CACHE_DIR to a folder that holds it"
        ) from None


def read_texts(paths: Iterable[Path]) -> Iterator[tuple[str, str]]:
    """(name of the folder, text) of each file, and of all files below each folder.

    Raises:
        UserError: a file that was named is missing or is not UTF-8; in a folder, such are skipped
            with a word.
    """
    for path in paths:
        if not path.is_dir():
            yield path.resolve().parent.name, _read_text(path)
            continue
        for file in sorted(p for p in path.rglob("*") if p.is_file()):
            try:
                yield file.resolve().parent.name, _read_text(file)
            except UserError as error:
                say(f"skipped: {error}")


def texts_by_language(paths: Iterable[Path], language: str | None = None) -> dict[str, list[str]]:
    """The texts of each language: the name of a file's folder, or `language` for all.

    Raises:
        UserError: as `read_texts`, or there is no text at all.
    """
    texts: dict[str, list[str]] = {}
    for folder, text in read_texts(paths):
        if text:
            texts.setdefault(language or folder, []).append(text)
    if not texts:
        raise UserError("no text in what was given; name UTF-8 files or folders of them")
    return dict(sorted(texts.items()))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None


class _Tiktoken:
    def __init__(self, encoding: tiktoken.Encoding) -> None:
        self._encoding = encoding

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._encoding.encode_ordinary_batch(texts)


class _HuggingFace:
    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise UserError(
                f"{path}: not a tokenizer.json: {' '.join(str(error).split())}"
            ) from None
        self._tokenizer.encode_special_tokens = True  # "<|im_end|>" in a text is text, as in ours

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]
