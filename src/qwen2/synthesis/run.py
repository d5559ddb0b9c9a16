"""A run of synthesis: ask for what has no answer yet, then write all documents.

out/recipe.yaml      the resolved recipe        out/prompts/HASH.yaml   what was asked, word by word
out/answers/         every answer (store.py)    out/generators/HASH.json   who answered
out/documents/       a source for the corpus    out/rejected/           the others, with reasons
out/summary.json     counts                     out/samples.html        a look at both
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen2.common.errors import UserError
from qwen2.common.files import durable_write, remove_leftovers
from qwen2.common.progress import Progress, say
from qwen2.common.signals import stop_on_signals
from qwen2.synthesis.generator import Answer, Generator, Prompt
from qwen2.synthesis.output import Made, write_outputs
from qwen2.synthesis.page import write_page
from qwen2.synthesis.plan import Plan
from qwen2.synthesis.recipe import SynthesisRecipe
from qwen2.synthesis.store import AnswerLog, Answers, claimed

RECIPE, ANSWERS, SUMMARY, PAGE = "recipe.yaml", "answers", "summary.json", "samples.html"


@dataclass(frozen=True)
class Answerer:
    """Who answers: known before it is there, for it isn't needed when all is answered."""

    identity: Mapping[str, Any]
    open: Callable[[], Generator]


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    finished: bool
    records: int
    answered: int
    """In this run and before."""
    summary: Mapping[str, Any] | None
    """What `summary.json` has; None when the run was stopped."""
    speed: Mapping[str, float] | None
    """Of this run, if it asked for anything."""


def synthesize(
    recipe: SynthesisRecipe,
    out: Path,
    *,
    answerer: Answerer | None = None,
    retry_failed: bool = False,
) -> Outcome:
    """Run or resume `recipe` in folder `out`.

    With another recipe in the same folder every answer that still fits is used, so a changed
    limit or a further task costs no more than it must.

    Args:
        retry_failed: ask again for what failed before.

    Raises:
        UserError: the recipe or the model can't be, or `out` holds something else.
    """
    _check_place(out)
    if answerer is None and recipe.tasks:
        answerer = Answerer(recipe.identity(), recipe.open)
    plan = Plan(recipe, answerer.identity if answerer else {})
    with claimed(out / ANSWERS):
        remove_leftovers(out)
        recipe.save(out / RECIPE)
        _write_origin(plan, out)
        records, missing = _count(plan, out, retry_failed)
        speed, finished = None, True
        if missing:
            assert answerer is not None
            run = _Asking(plan, out / ANSWERS, retry_failed, records, records - missing)
            finished = run.ask(answerer.open())
            speed, missing = run.speed, missing - run.asked
        if not finished:
            return Outcome(False, records, records - missing, None, speed)
        answers = Answers(out / ANSWERS)
        made = write_outputs(plan, answers, out)
        answers.close()
        summary = _summary(plan, made)
        durable_write(out / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False).encode())
        write_page(out / PAGE, summary, made.samples)
        return Outcome(True, records, records - missing, summary, speed)


class _Asking:
    """Asks for what has no answer, and keeps each one as it comes."""

    def __init__(
        self, plan: Plan, folder: Path, retry_failed: bool, records: int, known: int
    ) -> None:
        self._plan, self._folder, self._retry = plan, folder, retry_failed
        self._records, self._known = records, known
        self._keys: dict[int, str] = {}  # of those in flight
        self._started = time.monotonic()
        self.asked = self.tokens = 0

    def ask(self, generator: Generator) -> bool:
        """Whether all were answered; false when a signal came."""
        answers, log = Answers(self._folder), AnswerLog(self._folder)
        self._started = time.monotonic()
        with (
            closing(answers),
            closing(log),
            stop_on_signals() as stopped,
            Progress("synthesis", self._records, start=self._known) as progress,
            closing(generator.generate(self._prompts(answers), stopped)) as answered,
        ):
            for number, answer in answered:
                log.add(self._keys.pop(number), answer)
                self.asked += 1
                self.tokens += answer.completion_tokens
                speed = self.speed["tokens_per_s"]
                progress.update(self._known + self.asked, tokens_per_s=round(speed, 1))
            return stopped() is None

    @property
    def speed(self) -> dict[str, float]:
        """Of this run: records and drawn tokens a second, the model's loading not counted."""
        seconds = max(time.monotonic() - self._started, 1e-9)
        return {
            "asked": self.asked,
            "seconds": round(seconds, 2),
            "records_per_s": self.asked / seconds,
            "tokens_per_s": self.tokens / seconds,
        }

    def _prompts(self, answers: Answers) -> Iterator[Prompt]:
        for number, record in enumerate(self._plan):
            if _wanted(answers.get(record.key), self._retry):
                self._keys[number] = record.key
                yield Prompt(number, record.messages, record.sampling, record.seed)


def _wanted(answer: Answer | None, retry_failed: bool) -> bool:
    return answer is None or (retry_failed and answer.finish_reason == "failed")


def _count(plan: Plan, out: Path, retry_failed: bool) -> tuple[int, int]:
    """How many records there are, and how many of them are to be asked for."""
    records = missing = 0
    with closing(Answers(out / ANSWERS)) as answers:
        if answers.damaged:
            say(f"{answers.damaged} damaged lines in {out / ANSWERS}: asked for again")
        for record in plan:
            records += 1
            missing += _wanted(answers.get(record.key), retry_failed)
    if plan.tasks and not records:
        raise UserError(
            "nothing to ask for: no document is long enough (excerpt.least), or shares are too low"
        )
    return records, missing


def _check_place(out: Path) -> None:
    """A UserError if there is something else."""
    if (out / RECIPE).exists():
        SynthesisRecipe.load(out / RECIPE)
    elif out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"{out}: holds something else than a run; choose another --out")


def _write_origin(plan: Plan, out: Path) -> None:
    """What the hashes in the documents' metadata stand for."""
    origin = {"fingerprint": plan.fingerprint, **plan.identity}
    if plan.tasks:
        text = json.dumps(origin, indent=1, ensure_ascii=False)
        durable_write(out / "generators" / f"{plan.fingerprint}.json", text.encode())
    for task, _ in plan.tasks:
        task.save(out / "prompts" / f"{task.hash}.yaml")


def _summary(plan: Plan, made: Made) -> dict[str, Any]:
    return {
        "model": dict(plan.identity),
        "generator": plan.fingerprint,
        "tasks": {name: tally.as_json() for name, tally in made.tallies.items()},
    }
