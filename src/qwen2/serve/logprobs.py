"""Log-probabilities as OpenAI's API shows them: the form of chats, and the older of completions."""

from __future__ import annotations

import codecs
import math
from collections.abc import Sequence
from typing import Any

from qwen2.common.errors import UserError
from qwen2.inference import TokenLogprob
from qwen2.tokenizer import Tokenizer

LEAST = -9999.0  # stands for minus infinity, which JSON has not


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Of each token its text, bytes and logprob, and the same of the likeliest."""
    return [
        {
            **_shown(tokenizer, token.token, token.logprob),
            "top_logprobs": [_shown(tokenizer, *other) for other in token.top],
        }
        for token in tokens
    ]


def _shown(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = token_bytes(tokenizer, token)
    return {
        "token": data.decode(errors="replace"),
        "logprob": finite(logprob),
        "bytes": list(data),
    }


class CompletionLogprobs:
    """Grows with the tokens of a choice; `take` gives what is new, in lists of equal length."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters of the choice's text so far
        self._new = self._empty()

    def add(self, token: int, logprob: TokenLogprob | None) -> None:
        """One more token; the first of a prompt has no logprob."""
        data = token_bytes(self._tokenizer, token)
        new = self._new
        new["tokens"].append(token_name(data))
        new["text_offset"].append(self._offset)
        self._offset += len(self._utf8.decode(data))
        if logprob is None:
            new["token_logprobs"].append(None)
            new["top_logprobs"].append(None)
            return
        new["token_logprobs"].append(finite(logprob.logprob))
        shown: dict[str, float] = {}
        # Two tokens may have one name only if they have the same bytes; the likelier is shown.
        for other, value in (*logprob.top, (token, logprob.logprob)):
            shown.setdefault(token_name(token_bytes(self._tokenizer, other)), finite(value))
        new["top_logprobs"].append(shown)

    def take(self) -> dict[str, list[Any]]:
        """What was added since."""
        new, self._new = self._new, self._empty()
        return new

    @staticmethod
    def _empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def token_name(data: bytes) -> str:
    """The text of a token; as OpenAI writes it, `bytes:\\xe2\\x82` where it is not whole UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token; none of an id without text."""
    try:
        return tokenizer.decode_bytes([token])
    except UserError:
        return b""


def finite(logprob: float) -> float:
    """`logprob`, or a very small one where it is minus infinity."""
    return logprob if math.isfinite(logprob) else LEAST
