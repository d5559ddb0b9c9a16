"""The search for a mixture as a list of stages.

collect           a corpus run, unless shards are given
small             the same in a small vocabulary
proxies           mixtures drawn around the natural one; a small model on each
fit               a law from mixture to bits per byte; the best mixture by it
validate          larger proxies on that mixture and on its rivals, several seeds
report            mixture.json, mixture.html, train.yaml
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qwen2.common.equivalence import t_quantile
from qwen2.corpus.choose_mixture import choose
from qwen2.corpus.mixing_law import (
    ExponentialLaw,
    bootstrap_exponential,
    fit_law,
    law_values,
    out_of_fold,
    spearman,
)
from qwen2.corpus.mixture import Bounds, draw_mixtures, flattened, natural, uniform
from qwen2.pipeline.mixture.data import Text, corpus_stages, places, small
from qwen2.pipeline.mixture.page import write_results
from qwen2.pipeline.mixture.proxies import Job, run_jobs
from qwen2.pipeline.mixture.recipe import MixtureRecipe
from qwen2.pipeline.stages import Run, Stage

MixtureRun = Run[MixtureRecipe]

CHOSEN = "chosen"
FIRST_SEED = 1000  # of the validation's models, away from the proxies' one


def mixture_stages(recipe: MixtureRecipe, workers: int) -> list[Stage[MixtureRecipe]]:
    """What a run of `recipe` does, with `workers` proxies at a time."""
    return [
        *corpus_stages(recipe, workers),
        Stage("small", "Write it in a small vocabulary", small, makes="small"),
        Stage("proxies", "Train a proxy on each drawn mixture", lambda run: proxies(run, workers)),
        Stage("fit", "Fit a law and choose the best mixture", fit),
        Stage(
            "validate", "Train larger proxies on it and on others", lambda r: validate(r, workers)
        ),
        Stage("report", "Write the weights and what they rest on", report),
    ]


def bounds_of(recipe: MixtureRecipe, text: Text) -> Bounds:
    """What the final training's tokens allow."""
    return Bounds.by_epochs(text.tokens, recipe.budget, recipe.epochs, recipe.least)


def proxies(run: MixtureRun, workers: int) -> dict[str, Any]:
    """Bits per byte of a small model on each drawn mixture."""
    recipe, text = run.recipe, Text.of(run)
    drawn = draw_mixtures(
        natural(text.tokens), recipe.proxies, bounds_of(recipe, text), recipe.seed
    )
    jobs = [
        Job(f"proxy-{number:04}", recipe.proxy, recipe.seed, text.row_weights(mixture))
        for number, mixture in enumerate(drawn)
    ]
    bits = run_jobs("proxies", jobs, run.folder, run.folder / "proxies", workers)
    return {
        "mixtures": [text.named(mixture) for mixture in drawn],
        "bits_per_byte": bits,
        "parameters": recipe.proxy.model.num_non_embedding_parameters(),
    }


def measured(run: MixtureRun, text: Text) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(N, D) mixtures and (N, K) bits per byte of the proxies; K = D."""
    found = run.results["proxies"]
    tables = (found["mixtures"], found["bits_per_byte"])
    mixtures, bits = (
        np.array([[row[kind] for kind in text.kinds] for row in table]) for table in tables
    )
    return mixtures, bits


def fit(run: MixtureRun) -> dict[str, Any]:
    """The law, how well it predicts proxies it has not seen, and the mixture it chooses."""
    recipe, text = run.recipe, Text.of(run)
    mixtures, bits = measured(run, text)
    law = fit_law(recipe.law, mixtures, bits, recipe.seed)
    unseen = out_of_fold(_name(recipe), mixtures, bits)
    bootstraps = (
        bootstrap_exponential(mixtures, bits, recipe.bootstraps, law.ridge, recipe.seed)
        if isinstance(law, ExponentialLaw)
        else []
    )
    weighing = _importance(recipe, text)
    choice = choose(
        law,
        bounds_of(recipe, text),
        natural(text.tokens),
        weighing,
        rivals(recipe, text),
        bootstraps,
        recipe.seed,
    )
    linear = out_of_fold("linear", mixtures, bits)
    return {
        "law": type(law).__name__,
        "parameters": law_values(law, text.kinds, text.kinds),
        "importance": text.named(weighing),
        "predicted_unseen": [text.named(row) for row in unseen],
        "spearman": {
            kind: round(spearman(unseen[:, k], bits[:, k]), 4) for k, kind in enumerate(text.kinds)
        },
        "spearman_mean": round(spearman(unseen @ weighing, bits @ weighing), 4),
        "spearman_mean_linear": round(spearman(linear @ weighing, bits @ weighing), 4),
        "weights": text.named(choice.weights),
        "minimum": text.named(choice.minimum),
        "predicted": text.named(choice.predicted),
        "gains": {name: asdict(gain) for name, gain in choice.gains.items()},
    }


def rivals(recipe: MixtureRecipe, text: Text) -> dict[str, NDArray[np.float64]]:
    """The mixtures that the chosen one has to beat."""
    prior = natural(text.tokens)
    return {
        "natural": prior,
        "uniform": uniform(len(prior)),
        f"temperature {recipe.temperature:g}": flattened(prior, recipe.temperature),
    }


def validate(run: MixtureRun, workers: int) -> dict[str, Any]:
    """Larger proxies on the chosen mixture and its rivals; the difference by pairs of one seed."""
    recipe, text = run.recipe, Text.of(run)
    chosen = np.array([run.results["fit"]["weights"][kind] for kind in text.kinds])
    arms = {CHOSEN: chosen, **rivals(recipe, text)}
    seeds = range(FIRST_SEED, FIRST_SEED + recipe.seeds)
    jobs = [
        Job(
            f"{name.replace(' ', '-')}-{seed}",
            recipe.validation,
            seed,
            text.row_weights(weights),
        )
        for seed in seeds  # every arm of a seed before the next: a run cut short has whole pairs
        for name, weights in arms.items()
    ]
    bits = run_jobs("validate", jobs, run.folder, run.folder / "validation", workers)
    by_arm = {name: bits[place :: len(arms)] for place, name in enumerate(arms)}
    weighing = np.array(list(run.results["fit"]["importance"].values()))
    means = {
        name: [float(np.array([row[k] for k in text.kinds]) @ weighing) for row in rows]
        for name, rows in by_arm.items()
    }
    return {
        "mixtures": {name: text.named(weights) for name, weights in arms.items()},
        "seeds": list(seeds),
        "bits_per_byte": by_arm,
        "mean": means,
        "gains": {name: paired_gain(means[name], means[CHOSEN]) for name in arms if name != CHOSEN},
        "parameters": recipe.validation.model.num_non_embedding_parameters(),
    }


def paired_gain(rival: list[float], chosen: list[float]) -> dict[str, Any]:
    """By how much `chosen` is lower, run by run: mean, 95 % interval, and whether in every pair."""
    gains = np.array(rival) - np.array(chosen)
    error = float(gains.std(ddof=1)) / np.sqrt(len(gains))
    reach = t_quantile(0.975, len(gains) - 1) * error
    mean = float(gains.mean())
    return {
        "mean": mean,
        "low": mean - reach,
        "high": mean + reach,
        "each": gains.tolist(),
        "beats": bool((gains > 0).all() and mean > reach),
    }


def report(run: MixtureRun) -> dict[str, Any]:
    """The recipe to train by, the figures, and a page that shows them."""
    here, weights = places(run), run.results["fit"]["weights"]
    rounded = {kind: round(weight, 4) for kind, weight in weights.items()}
    trained = run.recipe.train_recipe(here.train, here.tokenizer, rounded)
    trained.save(run.folder / "train.yaml")
    return write_results(run.folder, run.results)


def terminal_summary(run: MixtureRun) -> str:
    """One screenful: the weights, and whether they are better."""
    found, validated = run.results["fit"], run.results["validate"]
    arms = validated["mixtures"]
    width = max(map(len, [*arms[CHOSEN], "bits per byte"]))
    lines = ["", " " * width + "".join(f"{name:>15}" for name in arms)]
    for kind in arms[CHOSEN]:
        lines.append(f"{kind:{width}}" + "".join(f"{arms[name][kind]:15.3f}" for name in arms))
    means = {name: float(np.mean(each)) for name, each in validated["mean"].items()}
    lines.append(f"{'bits per byte':{width}}" + "".join(f"{means[name]:15.4f}" for name in arms))
    for name, gain in validated["gains"].items():
        expected = found["gains"][name]
        lines.append(
            f"against {name}: {gain['mean']:+.4f} bits per byte lower "
            f"({gain['low']:+.4f} to {gain['high']:+.4f}), {expected['expected']:+.4f} predicted: "
            + ("better" if gain["beats"] else "not shown to be better")
        )
    lines.append(f"next: qwen2 train {Path(run.folder) / 'train.yaml'}")
    return "\n".join(lines)


def _name(recipe: MixtureRecipe) -> Any:
    """`auto` would change between all proxies and those of a fold: decide by all."""
    if recipe.law != "auto":
        return recipe.law
    return "lightgbm" if recipe.proxies * 7 // 8 >= 257 else "exponential"


def _importance(recipe: MixtureRecipe, text: Text) -> NDArray[np.float64]:
    """(K,) of the kinds, together 1."""
    given = recipe.importance
    if given is None:
        return uniform(len(text.kinds))
    weights = np.array([given.get(kind, 0.0) for kind in text.kinds])
    return weights / weights.sum()
