"""What a model is asked to make of an excerpt: texts of prompts as data (data/*.yaml).

A prompt is a Jinja template, sandboxed, over `text` (the excerpt), `language` (its name in English,
or empty) and the choices of the task, one value of each for a record: a style, a level ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from qwen2.common.config import Config, read_values
from qwen2.common.errors import UserError
from qwen2.common.templates import Template
from qwen2.synthesis.checks import Checks
from qwen2.synthesis.generator import digest

DATA = "qwen2.synthesis"
OWN = ("qa", "rewrite", "textbook")
LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan", "ceb": "Cebuano",
    "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "eo": "Esperanto", "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish",
    "fr": "French", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "id": "Indonesian", "it": "Italian", "ja": "Japanese", "km": "Khmer", "ko": "Korean",
    "lo": "Lao", "lt": "Lithuanian", "lv": "Latvian", "ms": "Malay", "my": "Burmese",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "te": "Telugu", "th": "Thai", "tl": "Tagalog",
    "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
_LABEL = re.compile(  # "Q:", "**Question 2:**", "- 问：" or "A:" ... at the start of a line
    r"[\W\d]{0,12}(?:(?P<question>Q|Question|问题?|問題?)|A|Answer|答案?|回答)[ \t]{0,4}\d{0,3}"
    r"[ \t]{0,4}[:：.)]",
    re.IGNORECASE,
)
_OF_THE_TEXT = re.compile(
    r"\b(?:the|this|given|provided) (?:text|passage|excerpt|extract|article)\b"
    r"|\b(?:der|des|dem|den|diese[rmn]?) (?:Text|Abschnitt|Auszug|Artikel)"
    r"|\b(?:le|du|ce) texte\b|\b(?:el|del|este) texto\b|文中|本文|这段|文章",
    re.IGNORECASE,
)


class TaskText(Config):
    """The text of a task, as it stands in a file."""

    kind: str = Field(pattern=r"[^/]+(/[^/]+)*")
    """Of the documents that come of it."""
    form: Literal["text", "pairs"]
    """What an answer is: the document itself, or questions with their answers."""
    system: str | None = None
    user: str
    choices: dict[str, dict[str, str]] = Field(default_factory=dict)
    """What is chosen for a record -> name of a choice -> what the prompt says of it."""
    documents: tuple[str, ...] = ()  # templates over `pairs`; one is taken for each record
    checks: Checks

    @model_validator(mode="after")
    def _pairs_make_documents(self) -> Self:
        if (self.form == "pairs") != bool(self.documents):
            raise ValueError("`documents` says how pairs become text; a form 'pairs' needs it")
        return self


class TaskConfig(Config):
    """A task of a recipe."""

    prompt: str | None = None  # a file of a user's own; None: the one of the task's name
    share: float = Field(gt=0, le=1)  # of the excerpts that it is made of
    choices: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Those that are made; all when a name is left out."""
    checks: dict[str, float] = Field(default_factory=dict)  # in place of the prompt's own
    sampling: dict[str, float] = Field(default_factory=dict)  # in place of the recipe's


@dataclass(frozen=True)
class Task:
    """A task that can be asked for."""

    name: str
    share: float
    whole: TaskText
    """As it stands in the file."""
    text: TaskText
    """With the choices that are made here."""
    checks: Checks
    hash: str
    """Of all that a model is asked, and of how its answer becomes a document."""

    @classmethod
    def of(cls, name: str, config: TaskConfig) -> Self:
        """Read the text of a task.

        Raises:
            UserError: there is no such task, or something about its text or settings can't be.
        """
        whole = _read(name, config.prompt)
        choices = {}
        for choice, wanted in config.choices.items():
            known = whole.choices.get(choice)
            if known is None or not wanted or not set(wanted) <= set(known):
                there = list(known or whole.choices)
                raise UserError(f"task {name!r}: choices.{choice}: there are {', '.join(there)}")
            choices[choice] = {key: known[key] for key in wanted}
        text = whole.model_copy(update={"choices": whole.choices | choices})
        checks = Checks.parse(
            {**whole.checks.model_dump(), **config.checks}, f"task {name!r}: checks"
        )
        identity = digest(whole.model_dump(mode="json", exclude={"checks"}), 8)
        task = cls(name, config.share, whole, text, checks, identity)
        task._check_names()
        return task

    def save(self, path: Path) -> None:
        """Write the text that `hash` stands for."""
        self.whole.save(path)

    def messages(
        self, text: str, language: str | None, choices: Mapping[str, str]
    ) -> tuple[Mapping[str, str], ...]:
        """The conversation that asks for it; `choices` has the key of each."""
        values = {name: self.text.choices[name][key] for name, key in choices.items()}
        values |= {"text": text, "language": LANGUAGES.get(language or "", "")}
        user = {"role": "user", "content": self._user.render(values)}
        if self.text.system is None:
            return (user,)
        return {"role": "system", "content": self.text.system}, user

    def document(self, answer: str, prompt: str, draw: int) -> str:
        """The text of a document from an answer; empty when it is not of the form asked for.

        Args:
            prompt: what was asked, without the excerpt.
            draw: decides which template.
        """
        if self.text.form == "text":
            return _outside_fence(answer.strip())
        found = good_pairs(pairs(answer), prompt)
        template = self._documents[draw % len(self._documents)]
        return template.render({"pairs": found}).strip() if found else ""

    @cached_property
    def _user(self) -> Template:
        return Template(self.text.user, {}, what=f"prompt of task {self.name!r}")

    @cached_property
    def _documents(self) -> list[Template]:
        what = f"documents of task {self.name!r}"
        return [Template(source, {}, what=what) for source in self.text.documents]

    def _check_names(self) -> None:
        known = {"text", "language", *self.text.choices}
        for templates, names in (([self._user], known), (self._documents, {"pairs"})):
            for template in templates:
                if wrong := sorted(template.variables - names):
                    raise UserError(
                        f"task {self.name!r}: its template names {wrong[0]!r}; "
                        f"there are {', '.join(sorted(names))}"
                    )
        if "text" not in self._user.variables:
            raise UserError(f"task {self.name!r}: its prompt has no {{{{ text }}}}")


def pairs(answer: str) -> list[dict[str, str]]:
    """Questions and answers, as `{"question", "answer"}`, of an answer in the form that was asked.

    Marks of Markdown around the labels, and numbers, are passed over. Either side may go over
    several lines, up to the next label or an empty line: what follows that is a remark.
    """
    found: list[dict[str, list[str]]] = []
    lines: list[str] = []  # of the side that goes on
    for line in answer.splitlines():
        label = _LABEL.match(line)
        if label is None:
            if not line.strip() and any(lines):
                lines = []
            lines.append(line.strip(" *_"))
            continue
        lines = [line[label.end() :].strip(" *_")]
        if label["question"]:
            found.append({"question": lines, "answer": []})
        elif found and not found[-1]["answer"]:
            found[-1]["answer"] = lines
    texts = [{side: " ".join(" ".join(part).split()) for side, part in p.items()} for p in found]
    return [pair for pair in texts if all(pair.values())]


def good_pairs(found: list[dict[str, str]], prompt: str) -> list[dict[str, str]]:
    """Without those that say again what the prompt or an earlier pair says, or speak of "the text".

    Small models write our example again, or one answer to every question.
    """
    good: list[dict[str, str]] = []
    said, asked = set[str](), prompt.casefold()
    for pair in found:
        sides = [side.casefold() for side in pair.values()]
        if not any(side in asked or side in said for side in sides) and not (
            _OF_THE_TEXT.search(pair["question"])
        ):
            good.append(pair)
        said.update(sides)
    return good


def data_values(name: str) -> dict[str, Any]:
    """A file of ours, as YAML."""
    with resources.as_file(resources.files(DATA) / "data" / f"{name}.yaml") as path:
        return read_values(path)


def _read(name: str, prompt: str | None) -> TaskText:
    if prompt is not None:
        return TaskText.load(Path(prompt))
    if name not in OWN:
        raise UserError(
            f"task {name!r}: ours are {', '.join(OWN)}; one of your own needs `prompt`, its file"
        )
    return TaskText.parse(data_values(name), f"task {name!r}")


def _outside_fence(text: str) -> str:
    """Without a fence around all of it, in which models like to put texts."""
    fenced = re.fullmatch(r"```\w*\n(.*)\n```", text, re.DOTALL)
    return fenced[1].strip() if fenced and "```" not in fenced[1] else text
