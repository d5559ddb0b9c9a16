"""`qwen2 upcycle` writes a mixture, or says in one line why not."""

from __future__ import annotations

import inspect
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from qwen2.cli.upcycle import upcycle
from qwen2.common.files import verify_folder
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hub import load_config, save
from qwen2.model.upcycle import UpcycleConfig
from qwen2.tokenizer import Tokenizer

COMMAND = [sys.executable, "-m", "qwen2.cli", "upcycle"]


@pytest.fixture
def dense(tmp_path: Path, tiny: ModelConfig, generator: torch.Generator) -> Path:
    model = Qwen2(tiny)
    init_weights(model, generator)
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer.from_ranks(
        {bytes([i]): i for i in range(256)}, {token: 256 + i for i, token in enumerate(controls)}
    )
    save(model, tokenizer, tmp_path / "dense")
    return tmp_path / "dense"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True)


def test_upcycle_prints_one_object(dense: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(dense, out, "--experts", 9, "--experts-per-token", 2, "--json")
    assert result.returncode == 0, result.stderr
    config = load_config(out)
    assert verify_folder(out) is None
    assert json.loads(result.stdout) == {
        "path": str(out),
        "parameters": config.num_parameters(),
        "active_parameters": config.num_active_parameters(),
        "expert_size": 16,
        "shared_size": 32,
        "copies": 2,  # 9 x 16 of 112
        "discarded": 80,
    }
    assert json.loads(result.stderr.splitlines()[-1])["stage"] == "upcycle"


def test_every_option_reaches_the_notes(dense: Path, tmp_path: Path) -> None:
    wanted = {
        "experts": 5, "experts_per_token": 3, "expert_size": 7, "shared_size": 130,
        "init": "copy", "reinit": 0.25, "granularity": "parameter", "std": "initializer_range",
        "router_std": 0.5, "shared": "random", "seed": 8,
    }  # fmt: skip
    assert set(wanted) == set(UpcycleConfig.model_fields)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in wanted.items()]
    result = run(dense, tmp_path / "out", *options, "--dtype", "bf16")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{tmp_path / 'out'}: ")
    notes = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert notes == {"dense": str(dense), **wanted}


def test_the_defaults_are_those_of_the_configuration() -> None:
    parameters = inspect.signature(upcycle).parameters
    for name, field in UpcycleConfig.model_fields.items():
        assert parameters[name].default == field.default


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "OUT"], "nowhere"),
        (["DENSE", "DENSE"], "exists already"),
        (["DENSE", "OUT", "--experts", "4"], "experts_per_token 8 exceeds experts 4"),
        (["DENSE", "OUT", "--expert-size", "0"], "expert_size"),
        (["DENSE", "OUT", "--init", "drop"], "'report' or 'copy'"),
        (["DENSE", "OUT", "--reinit", "2"], "reinit"),
        (["DENSE", "OUT", "--seed", "-1"], "seed"),
        (["DENSE", "OUT", "--dtype", "int3"], "int3"),
        (["DENSE", "OUT", "--experts", "some"], "experts"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    dense: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    places = {"DENSE": dense, "OUT": tmp_path / "out"}
    done = run(*[places.get(argument, argument) for argument in arguments])
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("qwen2: ")
    assert len(done.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_ctrl_c_leaves_nothing(dense: Path, tmp_path: Path) -> None:
    # Wide enough to take a while: 3 layers of 256 experts of 4,096.
    options = ["--experts", "256", "--expert-size", "4096"]
    command = [*COMMAND, str(dense), str(tmp_path / "out"), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.*/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "qwen2: interrupted"
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
