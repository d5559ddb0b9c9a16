"""Train the scorers of quality: gather labels, fit, score what was held out, calibrate, report.

The folder of a run has, at its end, what a corpus run needs: `linear/`, `head/`,
`calibration.safetensors`, and `quality.yaml`, which names them. Started again it goes on: after
the last finished stage, and within one after the last piece of documents that a model read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from qwen2.common.files import durable_write
from qwen2.common.progress import Progress
from qwen2.corpus.quality.calibrate import Calibration
from qwen2.corpus.quality.config import Extent, QualityConfig
from qwen2.corpus.quality.files import read_tensors
from qwen2.corpus.quality.labels import Example, balance
from qwen2.corpus.quality.linear import Linear
from qwen2.pipeline.quality.examples import (
    HELD_OUT,
    REFERENCE,
    TRAIN,
    gather,
    read_part,
    targets_of,
)
from qwen2.pipeline.quality.head import Head, fingerprint
from qwen2.pipeline.quality.page import write_page
from qwen2.pipeline.quality.recipe import QualityRecipe
from qwen2.pipeline.quality.results import compare
from qwen2.pipeline.quality.scorers import open_reader, open_scorers
from qwen2.pipeline.stages import Run, Stage, run_stages

EXAMPLES, LINEAR, HEAD = "examples", "linear", "head"
FIGURES = "quality.json"
CALIBRATION, CONFIG = "calibration.safetensors", "quality.yaml"
PIECE = 32  # documents that are read again, at most, after a run was killed

QualityRun = Run[QualityRecipe]
Arrays = dict[str, NDArray[Any]]


def train_quality(recipe: QualityRecipe, folder: Path) -> dict[str, dict[str, Any]]:
    """Run or resume `recipe` in `folder`; the results of its stages.

    Raises:
        UserError: the recipe names what is not there, or the folder is another run's.
    """
    stages = [
        Stage("labels", "Gather labelled texts", _gather, makes=EXAMPLES),
        Stage("linear", "Train the linear classifier", _linear, makes=LINEAR),
        *([Stage("head", "Train the head", _head, makes=HEAD)] if recipe.head else []),
        Stage("score", "Score what was held out", _score),
        Stage("calibrate", "Percentiles of each language", _calibrate),
        Stage("report", "Compare and draw", _report),
    ]
    return run_stages(stages, folder, recipe).results


def _gather(run: QualityRun) -> dict[str, Any]:
    return dict(gather(run.recipe, run.folder / EXAMPLES))


def _linear(run: QualityRun) -> dict[str, Any]:
    examples = read_part(run.folder / EXAMPLES, TRAIN)
    texts = [each.text for each in examples]
    linear = Linear.fit(texts, targets_of(examples), balance(examples), run.recipe.linear)
    linear.save(run.folder / LINEAR)
    return {"texts": len(texts), "bytes": _bytes(examples)}


def _head(run: QualityRun) -> dict[str, Any]:
    wanted = run.recipe.head
    assert wanted is not None
    examples = read_part(run.folder / EXAMPLES, TRAIN)
    reader = open_reader(wanted.model, wanted.extent, raw_config(run))

    def read(part: slice) -> Arrays:
        texts = [each.text for each in examples[part]]
        return {"pooled": reader.read(texts, loss=False).pooled}

    pooled = in_pieces("head", run.folder / "pieces/head", len(examples), read)["pooled"]
    head = Head.fit(pooled, targets_of(examples), balance(examples), wanted.head)
    head.save(run.folder / HEAD, wanted.extent, fingerprint(wanted.model))
    return {"texts": len(examples)}


def _score(run: QualityRun) -> dict[str, Any]:
    """Raw scores of the held-out texts and of the reference sample; what each scorer costs."""
    scorers = open_scorers(raw_config(run))
    seconds = np.zeros(len(scorers))
    size = 0
    for name in dict.fromkeys((HELD_OUT, REFERENCE)):
        if name == REFERENCE and not run.recipe.reference:
            continue
        examples = read_part(run.folder / EXAMPLES, name)
        size += _bytes(examples)

        def score(part: slice, some: Sequence[Example] = examples) -> Arrays:
            texts = [each.text for each in some[part]]
            languages = [each.language for each in some[part]]
            found: Arrays = {}
            for number, scorer in enumerate(scorers):
                started = time.perf_counter()
                found |= scorer(texts, languages)
                found[f"seconds.{number}"] = np.array([time.perf_counter() - started])
            return found

        columns = in_pieces(name, run.folder / f"pieces/{name}", len(examples), score)
        seconds += [columns[f"seconds.{number}"].sum() for number in range(len(scorers))]
    costs = {
        "+".join(scorer.columns): {"megabytes": size / 1e6, "seconds": float(taken)}
        for scorer, taken in zip(scorers, seconds, strict=True)
    }
    return {"costs": costs}


def _calibrate(run: QualityRun) -> dict[str, Any]:
    """Percentiles by the reference sample; and quality.yaml."""
    columns, examples = scored(run, REFERENCE)
    languages = [each.language for each in examples]
    Calibration.fit(columns, languages, run.recipe.least).save(run.folder / CALIBRATION)
    path = run.folder.resolve() / CALIBRATION
    config = raw_config(run).model_copy(update={"calibration": path})
    config.save(run.folder / CONFIG)
    return {"texts": len(examples), "config": CONFIG}


def _report(run: QualityRun) -> dict[str, Any]:
    columns, examples = scored(run, HELD_OUT)
    reference = scored(run, REFERENCE)
    figures = compare(columns, examples, reference, run.recipe.least)
    figures["costs"] = run.results["score"]["costs"]
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    durable_write(run.folder / FIGURES, text.encode())
    write_page(run.folder, figures, columns, examples)
    return figures


def raw_config(run: QualityRun) -> QualityConfig:
    """The scorers of the run, not calibrated."""
    recipe, folder = run.recipe, run.folder.resolve()
    perplexity = recipe.perplexity
    return QualityConfig(
        linear=folder / LINEAR,
        head=folder / HEAD if recipe.head else None,
        head_model=recipe.head.model if recipe.head else None,
        perplexity_model=perplexity.model if perplexity else None,
        perplexity_extent=perplexity.extent if perplexity else Extent(),
        dtype=recipe.dtype,
        device=recipe.device,
    )


def scored(run: QualityRun, name: str) -> tuple[dict[str, NDArray[np.float64]], list[Example]]:
    """The raw scores of one set of texts, and the texts."""
    if name == REFERENCE and not run.recipe.reference:
        name = HELD_OUT
    examples = read_part(run.folder / EXAMPLES, name)
    found = in_pieces(name, run.folder / f"pieces/{name}", len(examples), None)
    return {column: found[column] for column in raw_config(run).scores}, examples


def in_pieces(
    title: str, folder: Path, count: int, compute: Callable[[slice], Arrays] | None
) -> Arrays:
    """Arrays of `count` documents, end to end, computed `PIECE` at a time.

    Each piece is a file, which is not computed again; None for `compute` when all are there.
    """
    parts: list[Arrays] = []
    with Progress(title, count) as progress:
        for start in range(0, count, PIECE):
            path = folder / f"{start // PIECE:06}.safetensors"
            if not path.exists():
                assert compute is not None
                durable_write(path, save(compute(slice(start, min(start + PIECE, count)))))
                progress.update(min(start + PIECE, count))
            parts.append(read_tensors(path))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _bytes(examples: Sequence[Example]) -> int:
    return sum(len(each.text.encode("utf-8", "replace")) for each in examples)
