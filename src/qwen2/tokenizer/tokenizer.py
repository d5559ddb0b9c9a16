"""Text to token ids and back: byte-level BPE as in section 2.1 of the report.

Text is brought to Unicode form NFC, cut by one regular expression, and each piece is merged by
rank; tiktoken does the cutting and merging. There is no token for the beginning of a text.

Decisions where the report is silent:
- A control token written in a text is ordinary text unless `parse_special` asks otherwise.
- Lone surrogates, which are no text, become U+FFFD; surrogate pairs become their character.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import resources
from pathlib import Path
from typing import Self, TypeVar

import numpy as np
import tiktoken
from numpy.typing import NDArray
from tokenizers import normalizers

from qwen2.common.cores import available_cores
from qwen2.common.errors import UserError
from qwen2.tokenizer.long_runs import (
    LONG_RUN,
    cut_long_runs,
    for_long_runs,
    may_have_long_run,
)
from qwen2.tokenizer.stream import StreamDecoder as StreamDecoder
from qwen2.tokenizer.vocabulary import check_ids, merges_of, parse_tiktoken

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (END_OF_TEXT, IM_START, IM_END)

PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Characters that a thread encodes at a time: a few milliseconds' work.
_SHARE = 65_536

_NFC = normalizers.NFC()

T = TypeVar("T")


@dataclass(frozen=True)
class Tokenizer:
    """A vocabulary and what a checkpoint says about its use.

    ranks: the regular tokens; a token's rank is its id.
    special_tokens: tokens outside BPE and their ids (control tokens and user-defined ones).
    user_defined: those special tokens that are part of the text (`<tool_call>`), so that decoding
        with `skip_special` keeps them.
    chat_template: Jinja source, when the checkpoint has one (see chatml.py).
    eos_token: ends what this checkpoint generates: `<|endoftext|>` in base models, `<|im_end|>` in
        instruct models.
    """

    ranks: Mapping[bytes, int] = field(repr=False)
    special_tokens: Mapping[str, int]
    chat_template: str | None = field(default=None, repr=False)
    eos_token: str = END_OF_TEXT
    pad_token: str = END_OF_TEXT
    user_defined: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        check_ids(self.ranks, self.special_tokens)
        for use, token in (("eos", self.eos_token), ("pad", self.pad_token)):
            if token not in self.special_tokens:
                raise UserError(
                    f"{use} token {token!r}: not among the special tokens of the vocabulary"
                )

    @classmethod
    def qwen2(cls) -> Self:
        """The published vocabulary: 151,643 regular tokens and the three control tokens."""
        data = resources.files("qwen2.tokenizer") / "data"
        ranks = parse_tiktoken((data / "qwen.tiktoken").read_bytes(), "qwen.tiktoken")
        special_tokens = {token: len(ranks) + i for i, token in enumerate(CONTROL_TOKENS)}
        template = (data / "chatml.jinja").read_text(encoding="utf-8")
        return cls(ranks, special_tokens, chat_template=template)

    @classmethod
    def from_ranks(
        cls,
        ranks: Mapping[bytes, int],
        special_tokens: Mapping[str, int],
        chat_template: str | None = None,
        eos: str = END_OF_TEXT,
        pad: str = END_OF_TEXT,
    ) -> Self:
        """A tokenizer of given ranks.

        Raises:
            UserError: a byte without a token, an id given twice or free, an unknown eos or pad.
        """
        return cls(ranks, special_tokens, chat_template, eos, pad)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read a folder in the Hugging Face layout; see files.py for the files and errors."""
        from qwen2.tokenizer.files import read_folder

        return cls(**read_folder(Path(folder)))

    @classmethod
    def from_gguf_fields(
        cls,
        tokens: Sequence[str],
        token_types: Sequence[int],
        merges: Sequence[str],
        chat_template: str | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
    ) -> Self:
        """The tokenizer in a GGUF file's `tokenizer.ggml.*` fields; see files.py for the errors."""
        from qwen2.tokenizer.files import read_gguf_fields

        return cls(**read_gguf_fields(tokens, token_types, merges, chat_template, eos_id, pad_id))

    def save(self, folder: Path | str) -> None:
        """Write tokenizer.json, tokenizer_config.json, vocab.json and merges.txt into `folder`."""
        from qwen2.tokenizer.files import write_folder

        write_folder(self, Path(folder))

    def encode(self, text: str, *, parse_special: bool = False) -> list[int]:
        """Token ids of `text`; `parse_special` reads special tokens written in it as such."""
        if not parse_special:
            return self._encode_ordinary(text)
        ids: list[int] = []
        for i, part in enumerate(self._special_pattern.split(text)):
            ids += [self.special_tokens[part]] if i % 2 else self._encode_ordinary(part)
        return ids

    def encode_batch(
        self, texts: Iterable[str], *, parse_special: bool = False, threads: int | None = None
    ) -> list[list[int]]:
        """Token ids of every text, on `threads` threads (all cores by default)."""

        def encode(share: list[str]) -> list[list[int]]:
            if parse_special:
                return [self.encode(text, parse_special=True) for text in share]
            return [ids.tolist() for ids in self._encode_share(share)]

        return self._in_threads(encode, texts, threads)

    def encode_arrays(
        self, texts: Iterable[str], *, threads: int | None = None
    ) -> list[NDArray[np.uint32]]:
        """`encode_batch` without a Python object for each id: (tokens of it,) for every text.

        Arrays may be parts of one larger array.
        """
        return self._in_threads(self._encode_share, texts, threads)

    def _in_threads(
        self, encode: Callable[[list[str]], list[T]], texts: Iterable[str], threads: int | None
    ) -> list[T]:
        """What `encode` makes of every text, share by share."""
        shares = list(_shares(texts))
        self._encoding  # noqa: B018 (made here rather than by several threads at once)
        count = min(threads or available_cores(), len(shares))
        if count <= 1:
            done = list(map(encode, shares))
        else:  # the caller only waits: were it to work beside one thread, both would be as slow
            with ThreadPoolExecutor(count) as pool:
                done = list(pool.map(encode, shares))
        return [each for part in done for each in part]

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """Text of `ids`; bytes that are no UTF-8 become U+FFFD.

        Raises:
            UserError: an id that has no text.
        """
        return self.decode_bytes(ids, skip_special=skip_special).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = False) -> bytes:
        """Bytes of `ids`; `skip_special` leaves control tokens out, but not user-defined ones.

        Raises:
            UserError: an id that has no text.
        """
        ids = list(ids)
        if skip_special:
            ids = [id_ for id_ in ids if id_ not in self._control_ids]
        try:
            return self._encoding.decode_bytes(ids)
        except (KeyError, OverflowError):
            raise UserError(self._explain_unknown(ids)) from None

    def stream(self, *, skip_special: bool = False) -> StreamDecoder:
        """A decoder for ids that come one by one."""
        return StreamDecoder(partial(self.decode_bytes, skip_special=skip_special))

    @property
    def vocab_size(self) -> int:
        """One more than the largest id; a model's embedding may have more rows."""
        return self._encoding.n_vocab

    @property
    def eos_id(self) -> int:
        return self.special_tokens[self.eos_token]

    @property
    def pad_id(self) -> int:
        return self.special_tokens[self.pad_token]

    @property
    def end_of_text_id(self) -> int:
        """Id of `<|endoftext|>`, which ends a document."""
        return self._control(END_OF_TEXT)

    @property
    def im_start_id(self) -> int:
        """Id of `<|im_start|>`, which begins a message."""
        return self._control(IM_START)

    @property
    def im_end_id(self) -> int:
        """Id of `<|im_end|>`, which ends a message."""
        return self._control(IM_END)

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end generation: the checkpoint's own eos, and the end of a document."""
        return frozenset({self.eos_id, self.special_tokens.get(END_OF_TEXT, self.eos_id)})

    @cached_property
    def merges(self) -> list[tuple[bytes, bytes]]:
        """The merge of each token of several bytes, in the order of their ids."""
        return merges_of(self.ranks)

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        return self._encoding_by(PRE_TOKENS)

    @cached_property
    def _encoding_of_long_runs(self) -> tiktoken.Encoding:
        return self._encoding_by(for_long_runs(PRE_TOKENS))

    def _encoding_by(self, pre_tokens: str) -> tiktoken.Encoding:
        encoding = tiktoken.Encoding(
            "qwen2",
            pat_str=pre_tokens,
            mergeable_ranks=dict(self.ranks),
            special_tokens=dict(self.special_tokens),
        )
        # Each part of the expression stays a fifth faster in the thread that tries it first: let
        # that be this one, not some thread of a batch.
        encoding.encode_ordinary("it's 1 + é…\n \n\t  !  ")
        return encoding

    @cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        return alternatives(self.special_tokens)

    @cached_property
    def _control_ids(self) -> frozenset[int]:
        return frozenset(
            id_ for token, id_ in self.special_tokens.items() if token not in self.user_defined
        )

    def _control(self, token: str) -> int:
        if token not in self.special_tokens:
            raise UserError(f"this vocabulary has no {token}; it is not one of Qwen2's kind")
        return self.special_tokens[token]

    def _encode_ordinary(self, text: str) -> list[int]:
        if not text.isascii():
            text = _normalised(text)
        if len(text) < LONG_RUN or not may_have_long_run(text):
            return self._encoding.encode_ordinary(text)
        encode = self._encoding_of_long_runs.encode_ordinary
        return [id_ for part in cut_long_runs(text) for id_ in encode(part)]

    def _encode_share(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """The ids of each of many short texts by one call of tiktoken.

        A call for each leaves Python's lock for so short a time that threads do not run abreast.
        The texts are joined by a special token, at which tiktoken cuts before it does all else.
        """
        between = self.eos_token
        texts = [text if text.isascii() else _normalised(text) for text in texts]
        joined = between.join(texts)
        if len(joined) >= LONG_RUN or joined.split(between) != texts:
            return [np.array(self._encode_ordinary(text), np.uint32) for text in texts]
        ids: NDArray[np.uint32] = self._encoding.encode_to_numpy(
            joined, allowed_special={between}, disallowed_special=()
        )
        ends = np.append(np.flatnonzero(ids == self.eos_id), len(ids)).tolist()
        starts = [0, *(end + 1 for end in ends)]
        return [ids[start:end] for start, end in zip(starts, ends, strict=False)]

    def _explain_unknown(self, ids: Sequence[int]) -> str:
        known = {*self.ranks.values(), *self.special_tokens.values()}
        unknown = next(id_ for id_ in ids if id_ not in known)
        return (
            f"token id {unknown}: no such token, so it has no text; the vocabulary's ids end at "
            f"{self.vocab_size - 1}, and further rows of an embedding are padding"
        )


def alternatives(tokens: Iterable[str]) -> re.Pattern[str]:
    """A pattern whose one group matches any of `tokens`, the longest first."""
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")


def _normalised(text: str) -> str:
    """`text` in form NFC, without surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    # Python's own normalisation is quadratic in a run of combining marks; its check is not.
    return text if unicodedata.is_normalized("NFC", text) else _NFC.normalize_str(text)


def _shares(texts: Iterable[str]) -> Iterator[list[str]]:
    """Consecutive shares of `texts`, each of some `_SHARE` characters."""
    share: list[str] = []
    size = 0
    for text in texts:
        share.append(text)
        size += len(text)
        if size >= _SHARE:
            yield share
            share, size = [], 0
    if share:
        yield share
