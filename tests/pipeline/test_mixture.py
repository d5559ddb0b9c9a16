"""Experiments with proxies: honest bits, nothing lost by a kill, weights that can be trained."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

import qwen2
from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.common.recipes import find_recipe
from qwen2.evaluate.score import token_nats
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.pipeline.corpus.page import mixture_of
from qwen2.pipeline.mixture import MixtureRecipe, ThresholdRecipe, run_experiment, threshold_stages
from qwen2.pipeline.mixture import proxies as proxies_module
from qwen2.pipeline.mixture.data import Text
from qwen2.pipeline.mixture.experiment import bounds_of, mixture_stages, paired_gain
from qwen2.pipeline.mixture.proxies import ProxyText
from qwen2.pipeline.mixture.threshold import incompressible, threshold
from qwen2.pipeline.stages import Run, Stopped, run_stages
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.shards import Shards, write_shards
from qwen2.train.pretrain import PretrainRecipe, pretrain

WORDS = {
    "verse": [
        "to",
        "see",
        "a",
        "world",
        "in",
        "a",
        "grain",
        "of",
        "sand",
        "and",
        "heaven",
        "in",
        "a",
        "wild",
        "flower",
    ],
    "sums": [f"{i} + {i + 1} = {2 * i + 1};" for i in range(9)],
    "han": ["一花一世界", "一沙一天國", "君掌盛無邊", "剎那含永劫"],
}
MODEL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
    "max_position_embeddings": 32,
}
PROXY = {"model": MODEL, "tokens": 256, "context": 32, "rows": 2, "lr": 0.01}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three kinds of text of unequal size in a small vocabulary, some of it held out."""
    place = tmp_path_factory.mktemp("text")
    merged = [b" a", b"in", b"and", b" = ", "一".encode(), " 一".encode()]
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate([b"an", b" =", "一".encode()[:2], *merged])}
    control = {"<|endoftext|>": 265, "<|im_start|>": 266, "<|im_end|>": 267}
    coder = Tokenizer.from_ranks(ranks, control)
    coder.save(place / "tokenizer")
    random = np.random.default_rng(0)
    for part, count in (("train", 40), ("held-out", 4)):
        documents = [
            (kind, coder.encode(" ".join(random.choice(words, 30))))
            for kind, words in WORDS.items()
            for _ in range(count if kind != "sums" else count // 2)
        ]
        write_shards(
            place / part,
            documents,
            vocab_size=coder.vocab_size,
            end_of_text=coder.end_of_text_id,
            tokenizer="toy",
        )
    return {
        "train": str(place / "train"),
        "held_out": str(place / "held-out"),
        "tokenizer": str(place / "tokenizer"),
    }


@pytest.fixture
def values(shards: dict[str, str], tmp_path: Path) -> dict[str, Any]:
    """A search for a mixture as YAML has it."""
    return {
        "experiment": "mixture",
        "shards": shards,
        "vocabulary": 262,
        "evaluated_kilobytes": 4,
        "proxies": 8,
        "proxy": PROXY | {"model": MODEL | {"vocab_size": 262}},
        "validation": PROXY | {"model": MODEL | {"vocab_size": 262}},
        "bootstraps": 10,
        "least": 0.05,
        "train": {
            "model": MODEL | {"max_position_embeddings": 64},
            "out": str(tmp_path / "trained"),
            "context": 32,
            "rows": 2,
            "steps": 4,
            "optimizer": {"lr": 0.01},
            "threads": 1,
        },
    }


@pytest.fixture
def recipe(values: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def proxy_files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for name in ("proxies", "validation")
        for path in sorted((folder / name).glob("*.json"))
    }


@pytest.mark.slow
def test_a_search_leaves_weights_that_train(recipe: Path, tmp_path: Path) -> None:
    results, summary = run_experiment(recipe, [], tmp_path / "run", workers=1)
    found, validated = results["fit"], results["validate"]
    weights = found["weights"]
    assert set(weights) == set(WORDS)
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) >= 0.05 - 1e-9
    assert len(results["proxies"]["bits_per_byte"]) == 8
    assert set(validated["mixtures"]) == {"chosen", "natural", "uniform", "temperature 2"}
    assert all(len(each) == 3 for each in validated["mean"].values())
    assert "against natural" in summary

    trained = PretrainRecipe.load(tmp_path / "run" / "train.yaml")
    assert trained.weights == pytest.approx(weights, abs=1e-4)
    result = pretrain(trained)
    assert (result.finished, result.steps) == (True, 4)

    page = (tmp_path / "run" / "mixture.html").read_text()
    assert page.count("<svg") == 2
    assert "http" not in page.replace("http://www.w3.org/2000/svg", ""), "nothing from outside"
    # Made in the folder of a corpus run, it stands in the corpus's report.
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "mixture").symlink_to(tmp_path / "run")
    shown = "".join(mixture_of(tmp_path / "corpus"))
    assert "What the choice gains" in shown
    assert "<svg" in shown
    kept = json.loads((tmp_path / "run" / "mixture.json").read_text())
    assert kept["proxies"]["mixtures"] == results["proxies"]["mixtures"]
    assert (tmp_path / "run" / "predicted.svg").read_text().startswith("<svg")


@pytest.mark.slow
def test_interrupted_equals_never_interrupted(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run_experiment(recipe, [], tmp_path / "whole", workers=1)
    trained: list[str] = []

    def dying(job: Any, text: Any) -> dict[str, float]:
        trained.append(job.name)
        if len(trained) in (4, 11):  # among the proxies, and among the validation's
            raise KeyboardInterrupt
        return real(job, text)

    real = proxies_module.train_proxy
    monkeypatch.setattr(proxies_module, "train_proxy", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_experiment(recipe, [], tmp_path / "cut", workers=1)
    cut, _ = run_experiment(recipe, [], tmp_path / "cut", workers=1)
    assert len(trained) == 8 + 12 + 2, "each once, and the two that were cut once more"
    assert proxy_files(tmp_path / "cut") == proxy_files(tmp_path / "whole")
    for stage in ("proxies", "fit", "validate"):
        assert {**cut[stage], "seconds": 0} == {**whole[stage], "seconds": 0}


def test_a_signal_keeps_what_is_finished(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signalled(job: Any, text: Any) -> dict[str, float]:
        if job.name == "proxy-0002":
            os.kill(os.getpid(), signal.SIGTERM)
        return dict.fromkeys(WORDS, 1.0)

    monkeypatch.setattr(proxies_module, "train_proxy", signalled)
    with pytest.raises(Stopped, match="SIGTERM: 3 of 8 proxies are kept"):
        run_experiment(recipe, [], tmp_path / "run", workers=1)
    assert len(list((tmp_path / "run" / "proxies").glob("*.json"))) == 3


@pytest.mark.slow
def test_a_killed_run_in_processes_gives_the_same_files(recipe: Path, tmp_path: Path) -> None:
    """SIGKILL while two processes train; they go with their parent, and nothing is lost or bent."""
    run = [sys.executable, "-m", "qwen2.cli", "corpus", "mixture", str(recipe), "proxies=12"]
    paths = os.pathsep.join(
        [str(Path(qwen2.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    environment = os.environ | {"PYTHONPATH": paths}
    # Not in this process: which kernels it uses depends on the tests before.
    whole = [*run, "--out", str(tmp_path / "whole"), "--workers", "1"]
    subprocess.run(whole, env=environment, capture_output=True, check=True)
    command = [*run, "--out", str(tmp_path / "cut"), "--workers", "2", "--json"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    proxies = tmp_path / "cut" / "proxies"
    while process.poll() is None and len(list(proxies.glob("proxy-*.json"))) < 2:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert 2 <= len(list(proxies.glob("proxy-*.json"))) < 12
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["fit"]["weights"]
    assert proxy_files(tmp_path / "cut") == proxy_files(tmp_path / "whole")


@pytest.mark.slow
def test_a_file_of_another_job_is_not_taken(recipe: Path, tmp_path: Path) -> None:
    """Files are kept by name; one that was made with other weights must not pass for this."""
    run_experiment(recipe, [], tmp_path / "run", workers=1)
    before = proxy_files(tmp_path / "run")
    path = tmp_path / "run" / "proxies" / "proxy-0003.json"
    other = json.loads(path.read_text())
    other["weights"]["han"] += 0.1
    other["bits_per_byte"]["han"] = 0.0
    path.write_text(json.dumps(other))
    for stage in ("proxies", "fit", "validate", "report"):
        (tmp_path / "run" / "stages" / f"{stage}.json").unlink()
    run_experiment(recipe, [], tmp_path / "run", workers=1)
    assert proxy_files(tmp_path / "run") == before


@pytest.fixture
def run(values: dict[str, Any], tmp_path: Path) -> Run[MixtureRecipe]:
    """A run whose text is ready and nothing else."""
    recipe = MixtureRecipe.parse(values)
    return run_stages(mixture_stages(recipe, 1)[:1], tmp_path / "ready", recipe)


def test_bits_per_byte_are_of_the_whole_text(
    run: Run[MixtureRecipe], shards: dict[str, str]
) -> None:
    """Every byte of the held-out documents, none of the ends of documents, as `qwen2 score` has it,
    though 3 of 9 tokens had no room in the small vocabulary."""
    text = ProxyText(run.folder)
    full, small = Shards(Path(shards["held_out"])), text.held_out
    coder = Tokenizer.load(shards["tokenizer"])
    model = Qwen2(run.recipe.proxy.model).eval()
    init_weights(model, torch.Generator().manual_seed(0))
    bits = text.bits_per_byte(model, context=32)
    assert int(small.lengths.sum()) > int(full.lengths.sum())
    for index, kind in enumerate(small.index.kinds):
        nats, size = 0.0, 0
        for number in np.flatnonzero(small.kinds == index).tolist():
            ids = [0, *small.document(number)[:-1].tolist()]
            for start in range(0, len(ids) - 1, 32):  # pieces of the context, as in training
                nats += float(token_nats(model, ids[start : start + 33], 32).sum())
        for number in np.flatnonzero(full.kinds == index).tolist():
            size += len(coder.decode(full.document(number)[:-1].tolist()).encode())
        assert bits[kind] == pytest.approx(nats / math.log(2) / size, rel=1e-4)


def test_rows_are_weighed_by_what_a_kind_grows() -> None:
    """Half and half, but the second takes three tokens of the small vocabulary for one: 1 to 3."""
    text = Text(["a", "b"], np.array([10.0, 10.0]), np.array([1.0, 3.0]))
    assert text.row_weights(np.array([0.5, 0.5])) == pytest.approx({"a": 0.25, "b": 0.75})


def test_the_bounds_are_of_the_training(run: Run[MixtureRecipe]) -> None:
    """4 steps of 64 tokens at 0.01 epochs: no kind may give more than a hundredth of its text."""
    text = Text.of(run)
    tight = run.recipe.model_copy(update={"epochs": 0.06, "least": 0.0})
    assert tight.budget == 256
    assert bounds_of(tight, text).most == pytest.approx(
        np.minimum(1, 0.06 * text.tokens / 256), rel=1e-9
    )


def test_paired_gain_by_hand() -> None:
    """Gains 0.01, 0.02, 0.03: 0.02 on average, give or take 4.3027 x 0.01 / sqrt(3)."""
    gain = paired_gain([1.01, 2.02, 3.03], [1.0, 2.0, 3.0])
    assert gain["mean"] == pytest.approx(0.02)
    assert gain["high"] == pytest.approx(0.02 + 0.024841, abs=1e-5)
    assert not gain["beats"], "three of three, but it may be chance"
    assert paired_gain([1.02, 2.02, 3.03], [1.0, 2.0, 3.0])["beats"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"law": "lightgbm"}, "needs 257 proxies"),
        ({"shards": None, "corpus": {"recipe": "corpus/laptop", "tokens": None}}, "proxies read"),
        ({"vocabulary": 280}, "vocab_size 262 is not vocabulary 280"),
        ({"corpus": {"recipe": "corpus/laptop"}}, "give either corpus .* or shards"),
        ({"proxy_model": 1}, "unknown key 'proxy_model'"),
        ({"experiment": "mixtures"}, "did you mean 'mixture'"),
        ({"seeds": 2}, "seeds"),
    ],
)
def test_a_wrong_recipe_is_told_at_once(
    values: dict[str, Any], tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(values | change))
    with pytest.raises(UserError, match=said):
        run_experiment(path, [], tmp_path / "run", workers=1)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"weights": {"han": 1}}, "leave weights out"),
        ({"step": 4}, "unknown key 'step'"),
    ],
)
def test_a_wrong_training_recipe_is_told_at_once(
    values: dict[str, Any], change: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        MixtureRecipe.parse(values | {"train": values["train"] | change})


@pytest.mark.parametrize(
    ("name", "kind"), [("mixture", MixtureRecipe), ("relaxed_threshold", ThresholdRecipe)]
)
def test_the_shipped_recipes_are_whole(name: str, kind: type[Config]) -> None:
    recipe = kind.load(find_recipe(name))
    assert recipe.model_dump()["seeds"] >= 3


# The relaxed threshold.


@pytest.fixture
def threshold_recipe(values: dict[str, Any]) -> dict[str, Any]:
    names = ("shards", "vocabulary", "evaluated_kilobytes", "validation")
    kept = {name: values[name] for name in names}
    kept["validation"] = kept["validation"] | {"tokens": 3000}
    return kept | {"experiment": "relaxed_threshold", "margin": 0.5}


def test_the_strict_set_is_inside_the_relaxed_one(shards: dict[str, str]) -> None:
    text = Shards(Path(shards["train"]))
    scores = np.random.default_rng(1).random(len(text))
    strict, relaxed = (threshold(text, scores, share) for share in (0.35, 0.6))
    assert set(strict) < set(relaxed) < set(range(len(text)))
    for index in range(len(text.index.kinds)):
        kind = np.flatnonzero(text.kinds == index)
        for numbers, share in ((strict, 0.35), (relaxed, 0.6)):
            inside = np.intersect1d(kind, numbers)
            outside = np.setdiff1d(kind, numbers)
            assert scores[inside].min() > scores[outside].max()
            off = text.lengths[inside].sum() - share * text.lengths[kind].sum()
            assert abs(off) <= text.lengths[kind].max()


def test_both_thresholds_are_compared_at_equal_compute(
    threshold_recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe = ThresholdRecipe.parse(threshold_recipe)
    seen: list[bytes] = []

    def score(text: bytes) -> float:
        seen.append(text)
        return float(len(text))

    found = run_stages(threshold_stages(recipe, 1, score), tmp_path / "run", recipe).results
    assert found["select"]["ratio"] == pytest.approx(12 / 7, rel=0.1)
    assert found["select"]["epochs"]["strict"] / found["select"]["epochs"]["relaxed"] > 1.6
    assert any(text.decode().startswith(("一", "君", "剎")) for text in seen), "whole texts"
    arms = found["compare"]["bits_per_byte"]
    assert [len(arms[arm]) for arm in ("strict", "relaxed")] == [3, 3]
    tested = found["compare"]["relaxed_minus_strict"]
    assert set(tested) == {"mean", *WORDS}
    pairs = [
        np.mean(list(one.values())) - np.mean(list(other.values()))
        for one, other in zip(arms["relaxed"], arms["strict"], strict=True)
    ]
    assert tested["mean"]["mean"] == pytest.approx(np.mean(pairs))
    assert tested["mean"]["equivalent"] == (
        tested["mean"]["low"] > -0.5 and tested["mean"]["high"] < 0.5
    )


def test_scores_are_read_from_a_file(
    threshold_recipe: dict[str, Any], shards: dict[str, str], tmp_path: Path
) -> None:
    """The best of each kind by the file, through the recipe and the summary."""
    count = len(Shards(Path(shards["train"])))
    pq.write_table(pa.table({"score": np.arange(count) / count}), tmp_path / "scores.parquet")
    path = tmp_path / "recipe.yaml"
    scored = threshold_recipe | {"scores": str(tmp_path / "scores.parquet")}
    path.write_text(yaml.safe_dump(scored))
    results, summary = run_experiment(path, [], tmp_path / "run", workers=1)
    strict = np.load(tmp_path / "run/sets/strict.npy")
    text = Shards(tmp_path / "run/small/train")
    for index in range(len(WORDS)):
        kind = np.flatnonzero(text.kinds == index)
        inside = np.intersect1d(kind, strict)
        assert inside.tolist() == kind[-len(inside) :].tolist(), "later documents score higher"
    assert "relaxed - strict" in summary
    assert json.loads((tmp_path / "run/threshold.json").read_text())["select"] == results["select"]


@pytest.mark.parametrize(
    ("column", "numbers", "said"),
    [
        ("score", [0.5] * 3, "3 scores; the shards hold 100"),
        ("quality", [0.5] * 100, "no readable column 'score'"),
        ("score", [float("nan")] * 100, "missing or not a number"),
    ],
)
def test_scores_that_do_not_fit(
    threshold_recipe: dict[str, Any], tmp_path: Path, column: str, numbers: list[float], said: str
) -> None:
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({column: numbers}), path)
    recipe = ThresholdRecipe.parse(threshold_recipe | {"scores": str(path)})
    with pytest.raises(UserError, match=said):
        run_stages(threshold_stages(recipe, 1), tmp_path / "run", recipe)


def test_the_stand_in_score_prefers_text_to_boilerplate() -> None:
    varied = "".join(chr(97 + i) for i in np.random.default_rng(0).integers(0, 26, 400)).encode()
    assert incompressible(varied) > incompressible(b"Licensed under the same. " * 16)
    assert incompressible(b"short") == 0
