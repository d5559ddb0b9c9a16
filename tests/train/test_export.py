"""A model exported from a checkpoint is the one that saving the model gives, byte for byte."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qwen2.common.errors import UserError
from qwen2.model import hub
from qwen2.model.config import Mixture
from qwen2.tokenizer import Tokenizer
from qwen2.train import checkpoints
from qwen2.train.checkpointer import Checkpointer
from qwen2.train.checkpoints import RunState
from qwen2.train.export import export
from qwen2.train.loop import Trainee
from qwen2.train.pretrain import PretrainRecipe, pretrain

MOE = Mixture(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    shared_expert_intermediate_size=12,
)
SHARD = 8_000  # bytes: several files


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def tokenizer(data: Path) -> Tokenizer:
    return Tokenizer.load(data / "tokenizer")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True}, {"moe": MOE, "eos_token_id": [3, 5]}],
    ids=["dense", "tied", "mixture"],
)
def test_the_bytes_are_those_of_saving_the_model(
    changes: dict[str, Any],
    dtype: torch.dtype,
    tmp_path: Path,
    new_trainee: Callable[..., Trainee],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 3_000)
    trainee = new_trainee(dtype, **changes)
    run = Checkpointer(tmp_path / "run", keep=1)
    config = trainee.model.config
    recipe = new_recipe(tmp_path)
    run.save(RunState(1), trainee.weights.masters, trainee.optimizer, {}, recipe, config)
    assert run.last is not None
    assert len(list((run.last / "weights").iterdir())) > 3
    shutil.rmtree(run.last / "optimizer")  # which is not read
    hub.save(trainee.model, tokenizer, tmp_path / "saved", max_shard_bytes=SHARD)
    export(run.last, tmp_path / "out", tokenizer, dtype, max_shard_bytes=SHARD)
    found = files_of(tmp_path / "out")
    assert found == files_of(tmp_path / "saved")
    assert "model.safetensors.index.json" in found


def new_recipe(place: Path, **changes: Any) -> PretrainRecipe:
    values = {"model": {"published": "0.5b"}, "data": "d", "tokenizer": "t", "out": str(place)}
    values |= {"context": 8, "rows": 1, "steps": 1, "optimizer": {"lr": 1.0}} | changes
    return PretrainRecipe.parse(values)


def test_a_part_that_is_missing_is_named(
    tmp_path: Path,
    new_trainee: Callable[..., Trainee],
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 1)  # a file for each tensor
    trainee = new_trainee()
    run, config = Checkpointer(tmp_path, keep=1), trainee.model.config
    run.save(
        RunState(1), trainee.weights.masters, trainee.optimizer, {}, new_recipe(tmp_path), config
    )
    assert run.last is not None
    next((run.last / "weights").iterdir()).unlink()
    with pytest.raises(UserError, match=r"tensor '.*' is missing"):
        export(run.last, tmp_path / "out", tokenizer, torch.float32)


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from qwen2.cli.main import main; sys.argv[0] = 'qwen2'; main()"
    command = [sys.executable, "-c", code, "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_convert_takes_a_run_or_one_of_its_checkpoints(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    result = pretrain(PretrainRecipe.parse(recipe | {"keep_every": 3, "async_checkpoints": True}))
    assert result.model is not None
    folder = tmp_path / "out/checkpoints"
    assert sorted(path.name[-1] for path in folder.iterdir()) == ["3", "6", "8"]
    told = convert(tmp_path / "out", tmp_path / "last", "--json")
    assert told.returncode == 0, told.stderr
    assert json.loads(told.stdout)["dtype"] == "bfloat16"
    assert files_of(tmp_path / "last") == files_of(result.model)
    told = convert(folder / "step-00000006", tmp_path / "sixth", "--dtype", "fp32")
    assert told.returncode == 0, told.stderr
    (weights,) = (folder / "step-00000006/weights").iterdir()
    sixth, stored = hub.load_model(tmp_path / "sixth"), load_file(weights)
    assert sixth.dtype == torch.float32
    for name, parameter in sixth.named_parameters():
        assert torch.equal(parameter, stored[name])
    told = convert(folder / "step-00000006", tmp_path / "few", "--quantize", "int8", "--json")
    assert json.loads(told.stdout)["dtype"] == "int8", told.stderr
    told = convert(folder / "step-00000006", tmp_path / "sixth.gguf", "--json")
    assert told.returncode == 0, told.stderr
    (folder / "step-00000006/state.json").write_text("{}")
    told = convert(folder / "step-00000006", tmp_path / "broken")
    assert told.returncode == 2
    assert "state.json: 2 bytes" in told.stderr
    assert not (tmp_path / "broken").exists()
    (tmp_path / "new/checkpoints").mkdir(parents=True)
    told = convert(tmp_path / "new", tmp_path / "nothing")
    assert told.returncode == 2
    assert "no checkpoint yet" in told.stderr
