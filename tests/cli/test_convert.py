"""`qwen2 convert` writes a folder that loads, or says in one line why not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qwen2.model.config import ModelConfig, Quantisation
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hub import load_model, save
from qwen2.tokenizer import Tokenizer


@pytest.fixture
def checkpoint(tmp_path: Path, tiny: ModelConfig, generator: torch.Generator) -> Path:
    model = Qwen2(tiny)
    init_weights(model, generator)
    controls = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer.from_ranks(
        {bytes([i]): i for i in range(256)}, {token: 256 + i for i, token in enumerate(controls)}
    )
    save(model, tokenizer, tmp_path / "source")
    return tmp_path / "source"


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; from qwen2.cli.main import main; sys.argv[0] = 'qwen2'; main()"
    command = [sys.executable, "-c", code, "convert", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_convert_to_another_type(checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    result = convert(checkpoint, target, "--dtype", "bf16", "--json")
    assert result.returncode == 0, result.stderr
    model = load_model(target)
    assert json.loads(result.stdout) == {
        "path": str(target),
        "parameters": model.config.num_parameters(),
        "dtype": "bfloat16",
    }
    source = load_model(checkpoint).state_dict()
    assert all(torch.equal(t, source[n].bfloat16()) for n, t in model.state_dict().items())


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_convert_to_fewer_bits(checkpoint: Path, tmp_path: Path, method: str) -> None:
    target = tmp_path / "target"
    result = convert(checkpoint, target, "--quantize", method, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["dtype"] == method
    assert load_model(target).config.quantisation == Quantisation(method=method)
    again = convert(target, tmp_path / "again")  # as it is
    assert again.returncode == 0, again.stderr
    names = load_model(target).state_dict()
    assert all(
        torch.equal(t, names[n]) for n, t in load_model(tmp_path / "again").state_dict().items()
    )


@pytest.mark.parametrize(
    ("options", "type_"),
    [([], "F32"), (["--dtype", "bf16"], "BF16"), (["--quantize", "Q8_0"], "Q8_0")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_convert_to_gguf(checkpoint: Path, tmp_path: Path, options: list[str], type_: str) -> None:
    target = tmp_path / "target.gguf"
    result = convert(checkpoint, target, *options, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["dtype"] == type_
    source = load_model(checkpoint).model.norm.weight
    assert torch.equal(load_model(target, dtype="fp32").model.norm.weight, source)
    again = convert(checkpoint, target, "--format", "gguf")
    assert (again.returncode, again.stderr.count("\n")) == (2, 1)
    assert "exists already" in again.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quantize", "Q8_0"], "a folder takes int8 or int4"),
        (["--quantize", "int5"], "a folder takes int8 or int4"),
        (["--format", "gguf", "--quantize", "int8"], "only a folder takes it"),
        (["--format", "gguf", "--quantize", "Q4_K_M"], "llama-quantize"),
    ],
)
def test_forms_that_cannot_be(
    checkpoint: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = convert(checkpoint, tmp_path / "target", *options)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert message in result.stderr
    assert not (tmp_path / "target").exists()


def test_a_bad_source_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = sorted(path.name for path in tmp_path.iterdir())
    result = convert(checkpoint, tmp_path / "target")
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "not a whole safetensors file" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before
