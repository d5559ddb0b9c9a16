"""How well the laws of mixtures order RegMix's published models, by the number of proxies.

Spearman's rank correlation x 100 between the predicted and the measured loss on Pile-CC of 256
models of 1M parameters and 64 of 1B, after fitting to 32 (20 draws), 64, 128 (5 draws) or all 512
proxies. The peer is the linear law, and what was measured of all three laws before (`reference`).
LightGBM is left out where it is not installed. `--run` adds what experiments of our own found.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from harness import finish, options
from qwen2.common.spread import spread
from qwen2.corpus.mixing_law import BOOSTED_FROM, LawName, fit_law, spearman
from regmix import read_runs

DRAWS = {32: 20, 64: 5, 128: 5, 512: 1}
LAWS: tuple[LawName, ...] = ("exponential", "linear", "lightgbm")
REFERENCE = {
    "exponential": {"32": [88, 95.6], "512": [96, 98.5]},
    "linear": {"32": [69, 72], "512": [90, 88]},
    "lightgbm": {"512": [99, 96]},
}


def correlations(law: LawName, proxies: int) -> dict[str, Any]:
    """Mean, median and extremes over the draws of proxies, of models of 1M and of 1B."""
    runs = read_runs()
    mixtures, losses = runs["train_1m"]
    found: dict[str, list[float]] = {"test_1m": [], "test_1b": []}
    for seed in range(DRAWS[proxies]):
        some = np.random.default_rng(seed).permutation(len(mixtures))[:proxies]
        fitted = fit_law(law, mixtures[some], losses[some])
        for test, of in found.items():
            x, y = runs[test]
            of.append(100 * spearman(fitted.predict(x)[:, 0], y[:, 0]))
    return {test: {"mean": round(float(np.mean(of)), 2)} | spread(of) for test, of in found.items()}


def experiment(folder: Path) -> dict[str, Any]:
    """What a finished `qwen2 corpus mixture` found: the weights and what they gain."""
    path = folder / "threshold.json"
    if path.exists():
        values = json.loads(path.read_text())
        return {"select": values["select"], **values["compare"]}
    values = json.loads((folder / "mixture.json").read_text())
    fitted, validated = values["fit"], values["validate"]
    return {
        "proxies": len(values["proxies"]["mixtures"]),
        "predicted_gains": fitted["gains"],
        "spearman_unseen": {
            "exponential": fitted["spearman_mean"],
            "linear": fitted["spearman_mean_linear"],
        },
        **validated,
    }


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--run", type=Path, nargs="*", default=[], help="folders of experiments")
    chosen = parser.parse_args()
    names = [law for law in LAWS if law != "lightgbm" or find_spec("lightgbm")]
    figures = {
        law: {
            str(proxies): correlations(law, proxies)
            for proxies in DRAWS
            if law != "lightgbm" or proxies >= BOOSTED_FROM
        }
        for law in names
    }
    chosen.rounds = max(DRAWS.values())
    experiments = {folder.name: experiment(folder) for folder in chosen.run}
    finish(
        "mixture",
        {"spearman_x100": figures, "reference": REFERENCE, "experiments": experiments},
        chosen,
    )


if __name__ == "__main__":
    main()
