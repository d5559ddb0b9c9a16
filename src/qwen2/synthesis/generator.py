"""Who answers prompts: a model in this process (in_process.py) or behind an endpoint (endpoint.py).

Both draw each answer from a seed of the prompt's own, so that it does not depend on what else is
answered at the same time, and give answers as they come, each with the number of its prompt.
"""

from __future__ import annotations

import hashlib
import json
from collections import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from pydantic import Field

from qwen2.common.config import Config


class Sampling(Config):
    """How answers are drawn: the settings that servers share; temperature 0 is greedy."""

    max_tokens: int = Field(default=1024, ge=1)
    temperature: float = Field(default=0.7, ge=0, le=2)
    top_p: float = Field(default=0.8, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)  # 0: all; OpenAI's own service knows neither this ...
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)  # ... nor this


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that a model is to answer."""

    index: int
    messages: tuple[Mapping[str, str], ...]  # role, content
    sampling: Sampling
    seed: int  # 0 ... 2^31 - 1, which every server takes


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of a prompt; `failed` has an `error` instead of a text."""

    text: str
    finish_reason: Literal["stop", "length", "failed"]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str | None = None
    served_by: str | None = None
    """What an endpoint says of itself in this answer: its model and system fingerprint."""

    @classmethod
    def failure(cls, reason: str) -> Answer:
        """A prompt that can't be answered."""
        return cls("", "failed", error=well_formed(reason)[:500])

    def as_json(self) -> dict[str, Any]:
        """As JSON can hold it; `Answer(**it)` is the answer again."""
        return asdict(self)


Answering = abc.Generator[tuple[int, Answer], None, None]


class Generator(Protocol):
    """A model that answers prompts."""

    def generate(self, prompts: Iterable[Prompt], stopped: Callable[[], object]) -> Answering:
        """Answer every prompt, as many at a time as is good, in the order in which they end.

        `prompts` is read as room comes up, never ahead. Once `stopped()` is true no more answers
        come, and what is in flight is dropped.

        Raises:
            UserError: nothing can be answered at all; what one prompt suffers is its `failure`.
        """


def never() -> bool:
    """Not stopped."""
    return False


def digest(value: Any, size: int = 16) -> str:
    """Hexadecimal digest of a value of JSON."""
    text = json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=size).hexdigest()


def well_formed(text: str) -> str:
    """`text` with U+FFFD for lone surrogates, which JSON can bring and UTF-8 can't hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
