"""Labelled texts and the reference sample of a run, on disk between its stages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qwen2.common.errors import UserError
from qwen2.common.files import durable_folder
from qwen2.corpus.quality.judge import BEST, judge_all
from qwen2.corpus.quality.labels import Example, TextSource, hold_out, read_examples
from qwen2.pipeline.quality.judges import JudgeConfig, open_judge
from qwen2.pipeline.quality.recipe import QualityRecipe

TRAIN, HELD_OUT, REFERENCE = "train", "held_out", "reference"
FIELDS = ("text", "target", "language", "source", "key")


def gather(recipe: QualityRecipe, folder: Path) -> dict[str, int]:
    """Read and judge what the recipe names, and write it into `folder`; how many texts of each.

    Raises:
        UserError: a source or the judge fails, or there is nothing to learn from.
    """
    judged, unscored = ([], 0) if recipe.judge is None else judge(recipe.judge, folder.parent)
    examples = read_examples(recipe.labels, judged)
    train, held = hold_out(examples, recipe.held_out, recipe.seed)
    reference = _unlabelled(recipe.reference) if recipe.reference else held
    if not reference:
        raise UserError("reference: its sources have no texts")
    parts = {TRAIN: train, HELD_OUT: held, REFERENCE: reference}
    with durable_folder(folder) as partial:
        for name, part in parts.items():
            rows = {field: [getattr(each, field) for each in part] for field in FIELDS}
            pq.write_table(pa.table(rows), partial / f"{name}.parquet", compression="zstd")
    return {**{name: len(part) for name, part in parts.items()}, "unscored": unscored}


def judge(config: JudgeConfig, folder: Path) -> tuple[list[Example], int]:
    """The texts with the judge's scores, over 5; and how many it gave none."""
    found = _unlabelled(config.texts)
    who, name = open_judge(config)
    texts = [each.text for each in found]
    scores = judge_all(texts, who, name, config.characters, folder / "judged.jsonl")
    labelled = [
        Example(each.text, score / BEST, each.language, each.source, each.key)
        for each, score in zip(found, scores, strict=True)
        if score is not None
    ]
    return labelled, len(found) - len(labelled)


def read_part(folder: Path, name: str) -> list[Example]:
    """What `gather` wrote of `name`."""
    rows = pq.read_table(folder / f"{name}.parquet", columns=list(FIELDS)).to_pylist()
    return [Example(**row) for row in rows]


def targets_of(examples: Sequence[Example]) -> NDArray[np.float64]:
    """(texts,) from 0 to 1."""
    return np.array([each.target for each in examples], np.float64)


def _unlabelled(sources: Sequence[TextSource]) -> list[Example]:
    return [
        source.example(text, record, np.nan)
        for source in sources
        for _, text, record in source.records()
    ]
