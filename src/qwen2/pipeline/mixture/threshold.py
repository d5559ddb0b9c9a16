"""Does a relaxed quality threshold cost anything? Report section 3.1, in miniature.

The report relaxed its threshold, had 12T tokens instead of 7T, and saw no significant gain over the
7T. Here a strict set S lies inside a relaxed set R with |R| / |S| = 12 / 7; both thresholds come of
scores that are given or made once, kind by kind, so that both sets have the same kinds in the same
proportions. Models are trained on as many tokens of the one as of the other, several seeds each.
The claim is that of no difference, which a test that finds none does not show: two one-sided tests
with a margin do (common/equivalence.py).

Where the tokens of a run exceed those of S, S comes again and R goes on: that is the report's
question. Where they do not, only the quality of the text is compared; the result says how often
each is read.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2.common.equivalence import equivalence
from qwen2.common.files import durable_write
from qwen2.corpus.mixture import natural
from qwen2.pipeline.mixture.data import Text, corpus_stages, places, small
from qwen2.pipeline.mixture.proxies import Job, run_jobs, save_documents
from qwen2.pipeline.mixture.recipe import ThresholdRecipe
from qwen2.pipeline.mixture.scores import Score, scores_of
from qwen2.pipeline.stages import Run, Stage
from qwen2.tokens.shards import Shards

ThresholdRun = Run[ThresholdRecipe]
ARMS = ("strict", "relaxed")
FIRST_SEED = 1000
ENOUGH = 200  # bytes of a document below which its compression says little


def incompressible(text: bytes) -> float:
    """The part of a text that zlib leaves: boilerplate and tables score low. A stand-in."""
    return len(zlib.compress(text)) / len(text) if len(text) >= ENOUGH else 0.0


def threshold_stages(
    recipe: ThresholdRecipe, workers: int, score: Score = incompressible
) -> list[Stage[ThresholdRecipe]]:
    """What a run of `recipe` does; `score` is used where the recipe names no scores."""
    return [
        *corpus_stages(recipe, workers),
        Stage("small", "Write it in a small vocabulary", small, makes="small"),
        Stage("select", "Score it once; two thresholds", lambda run: select(run, score)),
        Stage("compare", "Train on both, several seeds", lambda run: compare(run, workers)),
    ]


def select(run: ThresholdRun, score: Score) -> dict[str, Any]:
    """The documents of the strict and of the relaxed set."""
    text = Shards(run.folder / "small/train")
    chosen = np.load(run.folder / "small/documents.npy")
    recipe, here = run.recipe, places(run)
    scores = scores_of(recipe.scores, Shards(here.train), here.tokenizer, score)[chosen]
    sets = {
        "strict": threshold(text, scores, recipe.relaxed_share / recipe.ratio),
        "relaxed": threshold(text, scores, recipe.relaxed_share),
    }
    for name, numbers in sets.items():
        save_documents(run.folder / "sets" / f"{name}.npy", numbers)
    tokens = {name: int(text.lengths[numbers].sum()) for name, numbers in sets.items()}
    return {
        "documents": {name: len(numbers) for name, numbers in sets.items()},
        "tokens": tokens,
        "ratio": tokens["relaxed"] / tokens["strict"],
        "epochs": {name: recipe.validation.tokens / size for name, size in tokens.items()},
    }


def threshold(text: Shards, scores: NDArray[np.float64], share: float) -> NDArray[np.int64]:
    """The best documents of each kind that have `share` of its tokens, within one document.

    Of two equal scores the document that comes first is taken, so a smaller share is within a
    larger one.
    """
    kinds = text.kinds
    kept = []
    for index in range(len(text.index.kinds)):
        numbers = np.flatnonzero(kinds == index)
        ordered = numbers[np.argsort(-scores[numbers], kind="stable")]
        sizes = text.lengths[ordered]
        before = np.cumsum(sizes) - sizes
        # A document is in when more than half of it is: the share is met on average.
        kept.append(ordered[(before + sizes / 2 <= share * sizes.sum()) | (before == 0)])
    return np.sort(np.concatenate(kept))


def compare(run: ThresholdRun, workers: int) -> dict[str, Any]:
    """Both arms with every seed, and whether they are equal within the margin."""
    recipe, text = run.recipe, Text.of(run)
    weights = text.row_weights(natural(text.tokens))
    jobs = [
        Job(f"{arm}-{seed}", recipe.validation, seed, weights, str(run.folder / f"sets/{arm}.npy"))
        for seed in range(FIRST_SEED, FIRST_SEED + recipe.seeds)
        for arm in ARMS
    ]
    bits = run_jobs("compare", jobs, run.folder, run.folder / "arms", workers)
    by_arm = {arm: bits[place :: len(ARMS)] for place, arm in enumerate(ARMS)}
    means = {arm: [float(np.mean(list(row.values()))) for row in by_arm[arm]] for arm in ARMS}
    tested = {"mean": (means["relaxed"], means["strict"])} | {
        kind: ([row[kind] for row in by_arm["relaxed"]], [row[kind] for row in by_arm["strict"]])
        for kind in text.kinds
    }
    result = {
        "bits_per_byte": by_arm,
        "mean": means,
        "relaxed_minus_strict": {
            name: asdict(equivalence(*pair, recipe.margin, recipe.alpha))
            for name, pair in tested.items()
        },
    }
    durable_write(
        run.folder / "threshold.json",
        json.dumps({**run.results, "compare": result}, indent=1).encode(),
    )
    return result


def threshold_summary(run: ThresholdRun) -> str:
    """A few lines: the sets, the difference, and whether it is shown to be small."""
    sets, tested = run.results["select"], run.results["compare"]["relaxed_minus_strict"]
    lines = [
        "",
        f"strict {sets['tokens']['strict']:,} tokens, relaxed {sets['tokens']['relaxed']:,}: "
        f"ratio {sets['ratio']:.3f}; read {sets['epochs']['strict']:.2f} and "
        f"{sets['epochs']['relaxed']:.2f} times",
    ]
    for name, found in tested.items():
        verdict = "equal" if found["equivalent"] else "not shown to be equal"
        lines.append(
            f"{name:14} relaxed - strict {found['mean']:+.4f} bits per byte "
            f"({found['low']:+.4f} to {found['high']:+.4f}): {verdict} within "
            f"{found['margin']:g}, p {found['p']:.3f}"
        )
    return "\n".join(lines)
