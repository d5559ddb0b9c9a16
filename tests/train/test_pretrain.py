"""Recipes, and whole runs of `qwen2 train` in processes of their own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from qwen2.common.errors import UserError
from qwen2.common.recipes import find_recipe
from qwen2.model.config import PUBLISHED, Mixture
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hub import load, load_config, save
from qwen2.pipeline.train import run_recipe
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.packing import NOTHING, Piece, pack
from qwen2.tokens.shards import Shards
from qwen2.train.checkpoints import newest_checkpoint
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.pretrain import PretrainRecipe, build_loader, pretrain
from qwen2.train.step import Trainee, train_step, trained_lengths


def losses(out: Path) -> list[tuple[int, float]]:
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_run_leaves_metrics_checkpoints_and_a_model(recipe: dict[str, Any]) -> None:
    asked = PretrainRecipe.parse(recipe)
    result = pretrain(asked)
    assert result.finished
    assert (result.step, result.tokens) == (8, 8 * 64)
    assert [step for step, _ in losses(asked.out)] == list(range(1, 9))
    kept = sorted(path.name for path in (asked.out / "checkpoints").iterdir())
    assert kept == ["step-00000006", "step-00000008"]
    assert PretrainRecipe.load(asked.out / "recipe.yaml") == asked
    assert result.model is not None
    model, tokenizer = load(result.model)
    assert model.dtype == torch.bfloat16
    text = "To see a world"
    assert tokenizer.encode(text) == Tokenizer.load(asked.tokenizer).encode(text)
    before = (asked.out / "metrics.jsonl").read_bytes()
    assert pretrain(asked) == result, "a finished run is left as it is"
    assert (asked.out / "metrics.jsonl").read_bytes() == before


def test_a_budget_of_tokens_is_rounded_up_to_steps(recipe: dict[str, Any]) -> None:
    del recipe["steps"]
    assert PretrainRecipe.parse(recipe | {"tokens": 129, "accumulation": 2}).total_steps == 2
    assert PretrainRecipe.parse(recipe | {"tokens": 128, "accumulation": 2}).total_steps == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 100}, "give either steps or tokens"),
        ({"context": 200_000}, "context exceeds model.max_position_embeddings"),
        ({"stage": "sft"}, "stage: Input should be 'pretrain'"),
        ({"lr": 1.0}, "unknown key 'lr'"),
        ({"optimizer": {"lr": 0}}, r"optimizer\.adamw\.lr"),
        ({"optimizer": {"kind": "muon", "lr": 1, "momentun": 1}}, "did you mean 'momentum'"),
        ({"schedule": {"kind": "wsd"}}, "schedule.wsd.decay"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    recipe: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PretrainRecipe.parse(recipe | change)


def test_a_vocabulary_too_small_for_the_shards_is_refused(recipe: dict[str, Any]) -> None:
    recipe["model"]["vocab_size"] = 100
    with pytest.raises(UserError, match=r"model.vocab_size 100: the shards .* have"):
        pretrain(PretrainRecipe.parse(recipe))
    assert not Path(recipe["out"]).exists()


def test_out_of_another_run_is_refused(recipe: dict[str, Any]) -> None:
    recipe["steps"] = 1
    pretrain(PretrainRecipe.parse(recipe))
    with pytest.raises(UserError, match=r"holds a run with another seed \(0, now 1\)"):
        pretrain(PretrainRecipe.parse(recipe | {"seed": 1}))
    assert pretrain(PretrainRecipe.parse(recipe | {"keep": 5})).finished


def test_recipes_are_found_by_name_and_all_are_valid() -> None:
    own = sorted((Path(str(files("qwen2"))) / "recipes").glob("*.yaml"))
    assert own
    for path in own:
        assert find_recipe(path.stem) == path
        if yaml.safe_load(path.read_text()).get("stage") == "pretrain":
            PretrainRecipe.load(path)
    with pytest.raises(UserError, match=r"did you mean 'miniature'\?"):
        find_recipe("minature")


def start(recipe: dict[str, Any], folder: Path) -> subprocess.Popen[str]:
    """`qwen2 train` on `recipe` in a process of its own."""
    path = folder / "recipe-given.yaml"
    path.write_text(yaml.safe_dump(recipe))
    program = "from qwen2.cli.main import main; main()"
    command = [sys.executable, "-c", program, "train", str(path), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def wait_for_lines(out: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Until the metrics of a running process have `count` lines."""
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_exits_0(
    asked: signal.Signals, recipe: dict[str, Any], tmp_path: Path
) -> None:
    out = Path(recipe["out"])
    recipe |= {"steps": 100_000, "checkpoint_every": 100_000}
    process = start(recipe, tmp_path)
    wait_for_lines(out, 4, process)
    process.send_signal(asked)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    result = json.loads(printed)
    assert not result["finished"]
    assert f"{asked.name}: stopped at step" in said
    assert newest_checkpoint(out / "checkpoints") == Path(result["checkpoint"])
    assert len(losses(out)) == result["step"]


@pytest.mark.slow
def test_after_sigkill_the_losses_are_bit_identical(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe |= {"steps": 60, "checkpoint_every": 4}
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    process = start(recipe | {"out": str(killed)}, tmp_path)
    wait_for_lines(killed, 14, process)
    process.kill()
    process.communicate()
    assert newest_checkpoint(killed / "checkpoints") is not None
    assert len(losses(killed)) < 60, "it was killed in the middle"
    for out in (killed, straight):
        process = start(recipe | {"out": str(out)}, tmp_path)
        assert process.wait() == 0, process.communicate()[1]
    assert losses(killed) == losses(straight)
    assert len(losses(killed)) == 60


@pytest.fixture
def trained(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A model to go on from: the export of a run in fp32."""
    asked = PretrainRecipe.parse(recipe | {"out": str(tmp_path / "first"), "dtype": "fp32"})
    result = pretrain(asked)
    assert result.model is not None
    return result.model


def from_init(recipe: dict[str, Any], init: Path) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key != "model"} | {"init": str(init)}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run_goes_on_from_existing_weights(
    recipe: dict[str, Any], trained: Path, dtype: str
) -> None:
    """At a learning rate of next to nothing, what comes out is what went in, rounded or not."""
    recipe |= {"optimizer": {"lr": 1e-30, "weight_decay": 0}, "steps": 2, "dtype": dtype}
    result = pretrain(PretrainRecipe.parse(from_init(recipe, trained)))
    assert result.model is not None
    before, _ = load(trained)
    after, _ = load(result.model)
    assert after.config == before.config
    for name, parameter in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], parameter.to(after.dtype)), name
    assert losses(result.model.parent)[0][1] < 4.5, "the first loss is that of a trained model"


def test_resumed_from_a_checkpoint_init_no_longer_counts(
    recipe: dict[str, Any], trained: Path, tmp_path: Path
) -> None:
    """Bit-identical to a run without an interruption, though `init` has other weights by then."""
    recipe = from_init(recipe, trained)
    straight = pretrain(PretrainRecipe.parse(recipe))
    assert straight.checkpoint is not None
    again = tmp_path / "again"
    asked = PretrainRecipe.parse(recipe | {"out": str(again)})
    (again / "checkpoints").mkdir(parents=True)
    earlier = straight.checkpoint.with_name("step-00000006")
    shutil.copytree(earlier, again / "checkpoints" / earlier.name)
    shutil.copy(straight.metrics, again)
    asked.save(again / "recipe.yaml")
    model, tokenizer = load(trained)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    save(model, tokenizer, trained, overwrite=True)
    assert pretrain(asked).finished
    assert losses(again) == losses(Path(recipe["out"]))


def test_a_published_size_is_a_shape(recipe: dict[str, Any]) -> None:
    change = {"model": {"published": "7b", "rope_theta": 10_000.0}}
    model = PretrainRecipe.parse(recipe | change).model
    assert model == PUBLISHED["7b"].model_copy(update={"rope_theta": 10_000.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"init": "somewhere"}, "give either model .* or init"),
        ({"model": None}, "give either model .* or init"),
        ({"model": {"published": "7B"}}, r"no published size '7B'; did you mean '7b'\?"),
        ({"model": {"published": "7b", "rope_teta": 1}}, "did you mean 'rope_theta'"),
    ],
)
def test_a_recipe_has_one_beginning(
    recipe: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        PretrainRecipe.parse(recipe | change)


def test_an_init_that_does_not_fit_is_refused(recipe: dict[str, Any], trained: Path) -> None:
    recipe = from_init(recipe, trained)
    with pytest.raises(UserError, match=r"max_position_embeddings 131072; stage long_context"):
        pretrain(PretrainRecipe.parse(recipe | {"context": 131_073}))
    model = Qwen2(load_config(trained).model_copy(update={"vocab_size": 200}))
    small = trained.with_name("small")
    save(model, Tokenizer.load(trained), small)
    with pytest.raises(UserError, match=r"small.vocab_size 200: the shards in .* have 259 ids"):
        pretrain(PretrainRecipe.parse(recipe | {"init": str(small)}))
    with pytest.raises(UserError, match="nowhere: no such folder"):
        pretrain(PretrainRecipe.parse(recipe | {"init": "nowhere"}))
    assert not Path(recipe["out"]).exists()


def test_a_mixture_goes_in_and_a_mixture_comes_out(
    recipe: dict[str, Any], trained: Path, tmp_path: Path
) -> None:
    """Continued pre-training after upcycling, and its long-context stage."""
    if find_spec("qwen2.model.moe") is None:
        pytest.skip("model/moe.py is not there yet: the decoder builds dense layers only")
    moe = Mixture(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
    changes = {"moe": moe, "max_position_embeddings": 32}
    model = Qwen2(load_config(trained).model_copy(update=changes))
    init_weights(model, torch.Generator().manual_seed(0))
    save(model, Tokenizer.load(Path(recipe["tokenizer"])), tmp_path / "mixture")
    result = pretrain(PretrainRecipe.parse(from_init(recipe, tmp_path / "mixture")))
    assert result.model is not None
    assert load_config(result.model) == model.config
    first, *_, last = (loss for _, loss in losses(Path(recipe["out"])))
    assert last < first
    stage = {"stage": "long_context", "context": 64, "out": str(tmp_path / "long")}
    path = tmp_path / "longer.yaml"
    path.write_text(yaml.safe_dump(from_init(recipe, result.model) | stage))
    longer = run_recipe(path)
    assert longer.model is not None
    after = load_config(longer.model)
    assert (after.moe, after.max_position_embeddings) == (moe, 64)


def test_weights_of_kinds_that_are_not_there_are_refused(recipe: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="weights: no source 'code'; there are prose"):
        pretrain(PretrainRecipe.parse(recipe | {"weights": {"code": 0.5, "prose": 0.5}}))
    assert not Path(recipe["out"]).exists(), "told before anything is written"


def test_packed_by_best_fit_a_run_resumes_too(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen2.train.stage.measure_matmul_peak", lambda *_: 1e12)
    recipe |= {"packing": "best_fit", "steps": 11}  # an epoch is 21 rows
    straight = pretrain(PretrainRecipe.parse(recipe))
    assert straight.checkpoint is not None
    again = tmp_path / "again"
    asked = PretrainRecipe.parse(recipe | {"out": str(again)})
    (again / "checkpoints").mkdir(parents=True)
    earlier = straight.checkpoint.with_name("step-00000009")
    shutil.copytree(earlier, again / "checkpoints" / earlier.name)
    shutil.copy(straight.metrics, again)
    assert pretrain(asked).finished
    assert losses(again) == losses(Path(recipe["out"]))
    loader = build_loader(asked, Shards(asked.data))
    seen = sum(int((next(loader).targets >= 0).sum()) for _ in range(11))
    lines = [json.loads(line) for line in straight.metrics.read_text().splitlines()]
    assert lines[-1]["tokens"] == straight.tokens == seen < 11 * 64, "padding is not counted"
    with pytest.raises(UserError, match=r"another packing \(best_fit, now stream\)"):
        pretrain(PretrainRecipe.parse(recipe | {"packing": "stream"}))


def test_padding_does_not_count(new_trainee: Callable[..., Trainee]) -> None:
    """The loss of a row with padding is that of what stands before it; so are tokens and FLOPs."""
    model = new_trainee().model
    ids = np.arange(20) % 7
    whole = pack([Piece(0, 0, 20)], lambda _: ids)
    padded = pack([Piece(0, 0, 20), Piece(NOTHING, 0, 12)], lambda _: ids)
    assert PackedLoss(model)(padded).item() == pytest.approx(PackedLoss(model)(whole).item())
    assert train_step(new_trainee(), [padded, whole], 0.0, 1.0).tokens == 40
    assert (padded.lengths, trained_lengths(padded)) == ([20, 12], [20])


def test_activations_computed_again_change_nothing_and_may_change_on_resume(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    outs = {how: tmp_path / how for how in ("none", "selective", "full")}
    recipe["steps"] = 3
    for how, out in outs.items():
        changed = {"activation_checkpointing": how, "out": str(out)}
        pretrain(PretrainRecipe.parse(recipe | changed))
    assert losses(outs["none"]) == losses(outs["selective"]) == losses(outs["full"])
    again = {"activation_checkpointing": "none", "out": str(outs["full"])}
    assert pretrain(PretrainRecipe.parse(recipe | again)).finished
