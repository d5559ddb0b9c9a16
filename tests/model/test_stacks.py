"""Checkpoints of mixtures: one by one, stacked, and as transformers writes and reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from qwen2.common.errors import UserError
from qwen2.common.runtime import parse_dtype
from qwen2.model.attention import PackedAttention
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2
from qwen2.model.hf_config import config_to_hf
from qwen2.model.hub import load_model, save
from qwen2.tokenizer import Tokenizer

SINGLE = "model.safetensors"
Maker = Callable[..., Qwen2]


@torch.no_grad()
def logits(model: Qwen2) -> torch.Tensor:
    tokens = torch.arange(40) * 7 % model.config.vocab_size
    return model(tokens, torch.arange(40), PackedAttention([40]))


@torch.no_grad()
def oracle_logits(folder: Path) -> torch.Tensor:
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.arange(40) * 7 % model.config.vocab_size
    return model.eval()(tokens[None]).logits[0]


@pytest.fixture
def single(tmp_path: Path, mixture: ModelConfig, random_model: Maker, tokenizer: Tokenizer) -> Path:
    """A checkpoint as we write it: a matrix each."""
    save(random_model(mixture), tokenizer, tmp_path / "single")
    return tmp_path / "single"


@pytest.fixture
def stacked(single: Path, mixture: ModelConfig, random_model: Maker) -> Path:
    """The same as it stands in memory."""
    state = random_model(mixture).state_dict()
    save_file(state, single / SINGLE, metadata={"format": "pt"})
    return single


@pytest.mark.parametrize("shard", [10**9, 50_000], ids=["one", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_folders_load_in_transformers_and_here(
    tmp_path: Path,
    mixture: ModelConfig,
    random_model: Maker,
    tokenizer: Tokenizer,
    shard: int,
    dtype: torch.dtype,
) -> None:
    model = random_model(mixture, dtype)
    save(model, tokenizer, tmp_path / "out", max_shard_bytes=shard)
    assert (tmp_path / "out" / SINGLE).exists() == (shard == 10**9)
    again = load_model(tmp_path / "out")
    assert again.dtype == dtype
    assert all(torch.equal(a, model.state_dict()[n]) for n, a in again.state_dict().items())
    ours = logits(load_model(tmp_path / "out", dtype="fp32"))
    torch.testing.assert_close(ours, oracle_logits(tmp_path / "out"), atol=1e-5, rtol=1e-5)


def test_experts_are_saved_one_by_one(
    single: Path, mixture: ModelConfig, random_model: Maker
) -> None:
    stored = load_file(single / SINGLE)
    experts = random_model(mixture).model.layers[1].mlp.experts
    place = "model.layers.1.mlp.experts.5"
    gate, up = experts.gate_up_proj[5].split(24)
    assert torch.equal(stored[f"{place}.gate_proj.weight"], gate)
    assert torch.equal(stored[f"{place}.up_proj.weight"], up)
    assert torch.equal(stored[f"{place}.down_proj.weight"], experts.down_proj[5])
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in stored)


def test_folders_of_transformers_load_here(
    tmp_path: Path, mixture: ModelConfig, random_model: Maker
) -> None:
    theirs = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**config_to_hf(mixture, "float32"))
    )
    theirs.load_state_dict(random_model(mixture).state_dict())
    theirs.save_pretrained(tmp_path)
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in load_file(tmp_path / SINGLE)
    model = load_model(tmp_path)
    assert model.config == mixture
    torch.testing.assert_close(logits(model), oracle_logits(tmp_path), atol=1e-5, rtol=1e-5)


def test_a_width_of_no_shared_experts_goes_there_and_back(
    tmp_path: Path, mixture: ModelConfig, random_model: Maker, tokenizer: Tokenizer
) -> None:
    assert mixture.moe is not None
    moe = mixture.moe.model_copy(update={"shared_expert_intermediate_size": 0})
    model = random_model(mixture.model_copy(update={"moe": moe}))
    save(model, tokenizer, tmp_path / "out")
    stored = load_file(tmp_path / "out" / SINGLE)
    assert not any("shared_expert" in name for name in stored)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))
    # Other programs keep the gate, and matrices of no rows.
    stored["model.layers.0.mlp.shared_expert_gate.weight"] = torch.ones(1, 64)
    stored["model.layers.0.mlp.shared_expert.up_proj.weight"] = torch.ones(0, 64)
    save_file(stored, tmp_path / "out" / SINGLE)
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))


@pytest.mark.parametrize("block", [100, 1000, 10**6])
@pytest.mark.parametrize("layout", ["single", "stacked"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_every_layout_and_block_gives_the_same(
    layout: str,
    dtype: str,
    block: int,
    mixture: ModelConfig,
    random_model: Maker,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks end within a matrix, and go across experts."""
    folder = request.getfixturevalue(layout)
    monkeypatch.setattr("qwen2.model.weights.PLAIN_BLOCK", block)
    monkeypatch.setattr("qwen2.model.weights.QUANTISED_BLOCK", block)
    state = load_model(folder, dtype=dtype).state_dict()
    for name, tensor in random_model(mixture).state_dict().items():
        assert torch.equal(state[name], tensor.to(parse_dtype(dtype))), name


def test_a_stacked_file_in_its_own_type_stays_mapped(stacked: Path) -> None:
    model = load_model(stacked)
    before = (stacked / SINGLE).read_bytes()
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    maps = Path("/proc/self/maps")
    if maps.exists():
        spans = [
            tuple(int(x, 16) for x in line.split()[0].split("-"))
            for line in maps.read_text().splitlines()
            if line.endswith(str(stacked / SINGLE))
        ]
        assert any(start <= stack.data_ptr() < end for start, end in spans)
    with torch.no_grad():
        stack.fill_(7)
    assert (stacked / SINGLE).read_bytes() == before


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = load_file(folder / SINGLE)
    change(state)
    save_file(state, folder / SINGLE)


EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
STACK = "model.layers.1.mlp.experts.gate_up_proj"


def drop(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.__delitem__(name)


def put(name: str, *shape: int) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda state: state.__setitem__(name, torch.zeros(shape))


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("single", drop(EXPERT), f"tensor {EXPERT!r} is missing"),
        ("single", put(EXPERT, 23, 64), f"tensor {EXPERT!r} has shape [23, 64], the configuration"),
        ("single", put(EXPERT.replace(".3.", ".8."), 24, 64), "unknown tensor"),
        ("stacked", drop(STACK), f"tensor {STACK!r} is missing"),
        ("stacked", put(STACK, 8, 24, 64), f"tensor {STACK!r} has shape [8, 24, 64]"),
        ("stacked", put(EXPERT, 24, 64), f"unknown tensor {EXPERT!r}"),
    ],
)
def test_errors_name_the_tensor_of_the_file(
    layout: str,
    change: Callable[[dict[str, torch.Tensor]], None],
    message: str,
    request: pytest.FixtureRequest,
) -> None:
    folder = request.getfixturevalue(layout)
    edit(folder, change)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_a_dense_configuration_does_not_take_experts(single: Path) -> None:
    path = single / "config.json"
    values = json.loads(path.read_text()) | {"model_type": "qwen2"}
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.gate_proj\.weight' is missing"):
        load_model(single)
