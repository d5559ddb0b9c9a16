"""The run of a corpus recipe: which stages, in which order, over which workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from qwen2.common.files import remove_leftovers
from qwen2.common.progress import Progress
from qwen2.pipeline.corpus import duplicates, fates, judge, keep, prepare, score
from qwen2.pipeline.corpus.contamination import search_part
from qwen2.pipeline.corpus.keep import SIDES
from qwen2.pipeline.corpus.layout import Layout
from qwen2.pipeline.corpus.page import write_report
from qwen2.pipeline.corpus.recipe import CorpusRecipe
from qwen2.pipeline.stages import Run, Stage, Stopped, run_stages
from qwen2.pipeline.workers import Workers, total

CorpusRun = Run[CorpusRecipe]
Figures = dict[str, Any]


def run_corpus(recipe: CorpusRecipe, out: Path, workers: Workers) -> CorpusRun:
    """Run or resume `recipe` in the folder `out`.

    Raises:
        UserError: something about the recipe, its sources or the folder.
        Stopped: a signal came; all finished parts are kept.
    """
    run = run_stages(corpus_stages(recipe, out, workers), out, recipe, same_recipe=False)
    run.results["report"] = report(Layout(out, recipe), workers)
    return run


def report(layout: Layout, workers: Workers) -> Figures:
    """Count what all stages left, and write summary.json and report.html."""
    parts = list(layout.parts)
    counts: Figures = {}
    with Progress("count", len(parts)) as progress:
        for done, of_part in enumerate(workers.map(partial(fates.count_part, layout), parts), 1):
            counts = fates.merged(counts, of_part)
            progress.update(done)
    if name := workers.stopped():
        raise Stopped(f"{name}: all stages are kept; run the same command again")
    return write_report(layout, counts)


def corpus_stages(recipe: CorpusRecipe, out: Path, workers: Workers) -> list[Stage[CorpusRecipe]]:
    """The stages that the recipe asks for."""
    layout = Layout(out, recipe)
    by_part = partial(_by_part, layout, workers)
    stages: list[tuple[str, str, Callable[[], Figures], bool]] = [
        ("documents", "Read, edit and measure", lambda: _read(layout, workers), False),
        ("scores", "Score quality", by_part("scores", score.score_part), False),
        ("decisions", "Decide by rules", by_part("decisions", judge.decide_part), False),
        ("sketches", "Sketch documents", by_part("sketches", duplicates.sketch_part), False),
        ("duplicates", "Find duplicates", partial(duplicates.join_duplicates, layout), True),
        ("paragraphs", "Note paragraphs", by_part("paragraphs", duplicates.digest_part), False),
        ("repeated", "Find repeated ones", partial(duplicates.join_paragraphs, layout), True),
        ("contamination", "Look for test sets", by_part("contamination", search_part), False),
        ("kept", "Write what stays", lambda: _keep(layout, workers), False),
        ("fates", "Count what became of all", by_part("fates", fates.fate_part), False),
        ("tokens", "Turn it into tokens", lambda: _tokenize(layout, workers), False),
    ]
    return [
        Stage(
            layout.name(name),
            title,
            lambda _, work=work: work(),  # type: ignore[misc]
            makes=layout.name(name) if joins else None,
        )
        for name, title, work, joins in stages
        if layout.has(name)
    ]


def _read(layout: Layout, workers: Workers) -> Figures:
    splits = prepare.plan_splits(layout)
    todo = prepare.unread(layout, splits)
    _drain("documents", partial(prepare.read_split, layout), todo, len(splits), workers)
    layout.close_parts()
    facts = [layout.facts(part) for part in layout.parts]
    return {
        "parts": len(facts),
        "documents": sum(of.documents for of in facts),
        "quarantined": sum(of.quarantined for of in facts),
        "bytes": sum(of.bytes for of in facts),
    }


def _keep(layout: Layout, workers: Workers) -> Figures:
    if not (layout.place("kept") / keep.CHOSEN).exists():
        keep.choose_sides(layout)
    return _by_part(layout, workers, "kept", keep.keep_part)()


def _tokenize(layout: Layout, workers: Workers) -> Figures:
    from qwen2.pipeline.corpus import tokens  # brings torch, which other stages do without

    for folder in (layout.place("tokens"), *(layout.place("tokens") / side for side in SIDES)):
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)
    tokens.save_tokenizer(layout)
    paths = {part: [tokens.shard_path(layout, s, part) for s in SIDES] for part in layout.parts}
    todo = [part for part, of in paths.items() if not all(map(tokens.is_shard, of))]
    _drain("tokens", partial(tokens.tokenize_part, layout), todo, len(paths), workers)
    return tokens.index_sides(layout)


def _by_part(
    layout: Layout, workers: Workers, stage: str, work: Callable[[Layout, str], Figures]
) -> Callable[[], Figures]:
    """Do `work` for each part that has no file of the stage yet."""

    def run() -> Figures:
        place = layout.place(stage)
        place.mkdir(parents=True, exist_ok=True)
        remove_leftovers(place)
        there = {path.name.partition(".")[0] for path in place.iterdir()}
        todo = [part for part in layout.parts if part not in there]
        _drain(stage, partial(work, layout), todo, len(layout.parts), workers)
        return {}

    return run


def _drain(
    title: str, work: Callable[[str], Figures], todo: list[str], count: int, workers: Workers
) -> Figures:
    """Do `work` for all of `todo`, telling progress out of `count`.

    Raises:
        Stopped: a signal came.
    """

    def told(results: Iterator[Figures]) -> Iterator[Figures]:
        done = count - len(todo)
        with Progress(title, count, start=done) as progress:
            for result in results:
                done += 1
                progress.update(done)
                yield result

    sums = total(told(workers.map(work, todo)))
    if name := workers.stopped():
        raise Stopped(f"{name}: all finished parts are kept; run the same command again")
    return sums
