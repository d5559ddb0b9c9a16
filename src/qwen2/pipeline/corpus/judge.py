"""Stage `decisions`: what stays, by the numbers that are stored; no text is read.

Of each document every reason to drop it is kept, with the value and the limit, not only the first:
`qwen2 corpus why` tells them all, and the report how often each would have been the only one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from qwen2.common.errors import UserError
from qwen2.common.files import durable_file
from qwen2.corpus.filters.rules import Failure, Rule
from qwen2.pipeline.corpus.layout import DOCUMENTS, Layout
from qwen2.pipeline.corpus.recipe import CorpusRecipe, LanguageRule

DECISIONS = pa.schema(
    [
        pa.field("kept", pa.bool_()),
        pa.field("reasons", pa.list_(pa.string())),  # names of rules
        pa.field("evidence", pa.list_(pa.string())),  # of each: value and limit
    ]
)
FACTS = ("language", "label", "found_language", "agreement", "bytes")

Reasons = list[list[tuple[str, str]]]


def decide_part(layout: Layout, part: str) -> dict[str, int]:
    """Decide over the documents of `part`; how many stay and go."""
    source = layout.facts(part).source
    columns = _numbers(layout, part, source)
    reasons = _reasons(columns, layout.recipe, source)
    kept = [not of for of in reasons]
    table = pa.table(
        [
            kept,
            [[name for name, _ in of] for of in reasons],
            [[evidence for _, evidence in of] for of in reasons],
        ],
        schema=DECISIONS,
    )
    write_table(layout.file("decisions", part), table)
    return {"documents": len(kept), "kept": sum(kept)}


def write_table(path: Path, table: pa.Table) -> None:
    """Write `table` as an Arrow file, durably."""
    with durable_file(path) as partial, pa.ipc.new_file(partial, table.schema) as writer:
        writer.write_table(table)


def read_table(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """An Arrow file of a stage.

    Raises:
        UserError: the stage has not made it.
    """
    try:
        with pa.memory_map(str(path)) as source:
            table = pa.ipc.open_file(source).read_all()
    except FileNotFoundError:
        raise UserError(f"{path}: not made yet; run the recipe to its end first") from None
    return table.select(columns) if columns else table


def rules_of(recipe: CorpusRecipe, source: str) -> tuple[Rule, ...]:
    """The rules that hold for the documents of `source`, of its filter set and of the scores."""
    scored = recipe.quality.limits.rules if recipe.quality else ()
    return (*recipe.filters_of(source).in_force.rules, *scored)


def _numbers(layout: Layout, part: str, source: str) -> dict[str, pa.ChunkedArray]:
    """The columns that decisions are made of: facts, statistics, scores."""
    recipe = layout.recipe
    filters = recipe.filters_of(source)
    wanted = [*FACTS, *sorted(filters.judged)]
    table = pq.read_table(layout.part(part) / DOCUMENTS, columns=wanted)
    columns = {name: table[name] for name in table.column_names}
    if layout.has("scores"):
        scores = read_table(layout.file("scores", part))
        columns |= {name: scores[name] for name in scores.column_names}
    return columns


def _reasons(columns: Mapping[str, pa.ChunkedArray], recipe: CorpusRecipe, source: str) -> Reasons:
    filters = recipe.filters_of(source)
    languages = columns["language"].to_pylist()
    reasons: Reasons = [[] for _ in languages]
    for of, size in zip(reasons, columns["bytes"].to_pylist(), strict=True):
        if size < recipe.shortest:
            of.append(("short", f"{size} bytes, {recipe.shortest} wanted"))
    if recipe.language and filters.measures != "code":
        _by_language(reasons, columns, recipe.language)
    numbers = {name: _array(columns[name]) for name in filters.judged}
    _add(reasons, filters.judge(numbers, languages))
    if recipe.quality:
        rules = recipe.quality.limits
        numbers = {name: _array(columns[name]) for name in rules.statistics}
        _add(reasons, rules.judge_all(numbers, languages))
    return reasons


def _by_language(
    reasons: Reasons, columns: Mapping[str, pa.ChunkedArray], rule: LanguageRule
) -> None:
    names = ("language", "label", "found_language", "agreement")
    rows = zip(*(columns[name].to_pylist() for name in names), strict=True)
    for of, (language, label, found, agreement) in zip(reasons, rows, strict=True):
        if rule.keep is not None and language not in rule.keep:
            of.append(("language", f"{language} is not wanted"))
        wrong = agreement is not None and agreement < rule.agreement
        if rule.mislabelled == "drop" and wrong:
            of.append(("mislabelled", f"labelled {label}, found {found}"))


def _add(reasons: Reasons, failures: Sequence[tuple[Failure, ...]]) -> None:
    for of, failed in zip(reasons, failures, strict=True):
        of += [(failure.rule, str(failure).partition(": ")[2]) for failure in failed]


def _array(column: pa.ChunkedArray) -> NDArray[np.float64]:
    values: NDArray[Any] = column.to_numpy()
    return values.astype(np.float64)
