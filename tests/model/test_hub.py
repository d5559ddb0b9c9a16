"""Folders in the Hugging Face layout, and names on the hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import qwen2
from qwen2.common.errors import UserError
from qwen2.common.files import verify_folder
from qwen2.common.runtime import parse_dtype
from qwen2.model.attention import PackedAttention
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2
from qwen2.model.hf_config import config_to_hf
from qwen2.model.hub import load, load_config, load_model, save
from qwen2.tokenizer import Tokenizer

Maker = Callable[..., Qwen2]
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


@torch.no_grad()
def logits(model: Qwen2) -> torch.Tensor:
    tokens = torch.arange(40) * 7 % model.config.vocab_size
    return model(tokens, torch.arange(40), PackedAttention([40]))


@torch.no_grad()
def oracle_logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.arange(40) * 7 % model.config.vocab_size
    return model(tokens[None]).logits[0]


def shape(tiny: ModelConfig, tied: bool) -> ModelConfig:
    return tiny.model_copy(update={"tie_word_embeddings": tied, "eos_token_id": 257})


@pytest.fixture
def whole(tmp_path: Path, tiny: ModelConfig, random_model: Maker, tokenizer: Tokenizer) -> Path:
    """An untied checkpoint in one file."""
    save(random_model(tiny), tokenizer, tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def sharded(tmp_path: Path, tiny: ModelConfig, random_model: Maker, tokenizer: Tokenizer) -> Path:
    """The same in several."""
    save(random_model(tiny), tokenizer, tmp_path / "sharded", max_shard_bytes=200_000)
    return tmp_path / "sharded"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shard", [10**9, 50_000], ids=["single", "sharded"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_saved_folders_load_in_transformers_and_here(
    tmp_path: Path,
    tiny: ModelConfig,
    random_model: Maker,
    tokenizer: Tokenizer,
    tied: bool,
    shard: int,
    dtype: torch.dtype,
) -> None:
    model = random_model(shape(tiny, tied), dtype)
    save(model, tokenizer, tmp_path / "out", max_shard_bytes=shard)
    assert (tmp_path / "out" / INDEX).exists() == (shard < 10**9)
    assert verify_folder(tmp_path / "out") is None
    stored = [load_file(file) for file in (tmp_path / "out").glob("*.safetensors")]
    assert any("lm_head.weight" in file for file in stored) != tied
    again, same = load(tmp_path / "out")
    assert again.dtype == dtype
    assert again.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(a, model.state_dict()[n]) for n, a in again.state_dict().items())
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert same.ranks == tokenizer.ranks
    assert torch.equal(logits(again), logits(model))
    # Both compute in fp32 from what is stored, so that only the files can make a difference.
    ours = logits(load_model(tmp_path / "out", dtype="fp32"))
    torch.testing.assert_close(ours, oracle_logits(tmp_path / "out"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shard", ["1GB", "100KB"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_folders_of_transformers_load_here(
    tmp_path: Path,
    tiny: ModelConfig,
    random_model: Maker,
    tokenizer: Tokenizer,
    tied: bool,
    shard: str,
) -> None:
    config = shape(tiny, tied)
    theirs = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**config_to_hf(config, "float32"))
    )
    theirs.load_state_dict(random_model(config).state_dict())
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    tokenizer.save(tmp_path)
    assert (tmp_path / INDEX).exists() == (shard == "100KB")
    model, _ = load(tmp_path)
    assert load_config(tmp_path) == model.config == config
    torch.testing.assert_close(logits(model), oracle_logits(tmp_path), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_a_type_asked_for(whole: Path, dtype: str) -> None:
    wanted = parse_dtype(dtype)
    model, original = load_model(whole, dtype=dtype), load_file(whole / SINGLE)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == wanted
        assert torch.equal(tensor, original[name].to(wanted))


def test_large_tensors_are_converted_in_blocks_of_rows(
    whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen2.model.weights.PLAIN_BLOCK", 1000)  # rows of 64, 112 and 320
    state, original = load_model(whole, dtype="bf16").state_dict(), load_file(whole / SINGLE)
    assert all(torch.equal(tensor, original[name].bfloat16()) for name, tensor in state.items())


def test_saving_in_another_type(
    tmp_path: Path, tiny: ModelConfig, random_model: Maker, tokenizer: Tokenizer
) -> None:
    save(random_model(tiny), tokenizer, tmp_path / "out", torch.bfloat16)
    assert load_model(tmp_path / "out").dtype == torch.bfloat16
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_every_id_that_ends_generation_is_saved(
    tmp_path: Path, tiny: ModelConfig, random_model: Maker, tokenizer: Tokenizer
) -> None:
    ending = {None: (259, [257, 259]), 258: (258, [257, 258, 259]), 259: (259, [257, 259])}
    for own, (config_id, ids) in ending.items():
        model = random_model(tiny.model_copy(update={"eos_token_id": own}))
        save(model, tokenizer, tmp_path / "out", overwrite=True)
        assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == config_id
        assert load_config(tmp_path / "out").eos_token_id == ids
        assert transformers.GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == ids


def test_training_a_mapped_model_leaves_the_file(whole: Path) -> None:
    before = hashlib.sha256((whole / SINGLE).read_bytes()).digest()
    model = load_model(whole)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.arange(9), torch.arange(9), PackedAttention([9])).sum().backward()
    optimizer.step()
    assert not torch.equal(model.lm_head.weight, load_model(whole).lm_head.weight)
    assert hashlib.sha256((whole / SINGLE).read_bytes()).digest() == before


def test_saving_over_a_mapped_checkpoint(whole: Path, tokenizer: Tokenizer) -> None:
    model = load_model(whole)
    expected = logits(model)
    save(model, tokenizer, whole, overwrite=True)
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(load_model(whole)), expected)


def test_saving_never_replaces_unasked(whole: Path, tokenizer: Tokenizer) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        save(load_model(whole), tokenizer, whole)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    assert [path.name for path in whole.parent.iterdir()] == ["whole"]


def test_buffers_of_old_checkpoints_are_passed_over(whole: Path) -> None:
    expected = logits(load_model(whole))
    edit(whole, lambda t: t.update({INV_FREQ: torch.ones(32)}))
    assert torch.equal(logits(load_model(whole)), expected)


def test_a_tied_model_may_carry_its_head_if_it_is_the_embedding(whole: Path) -> None:
    set_config(whole, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"'lm_head.weight' differs from"):
        load_model(whole)
    edit(whole, lambda t: t.update({"lm_head.weight": t[EMBEDDING].clone()}))
    model = load_model(whole)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- what is refused ------------------------------------------------------------------------------

NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / SINGLE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / SINGLE)


def set_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def rename(old: str, new: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder, lambda t: t.update({new: t.pop(old)}))


def cut(size: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        (folder / SINGLE).write_bytes(data[:size])

    return change


def patch(old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / SINGLE).read_bytes()
        assert len(old) == len(new)
        assert old in data
        (folder / SINGLE).write_bytes(data.replace(old, new, 1))

    return change


def only_pickle(folder: Path) -> None:
    torch.save(load_file(folder / SINGLE), folder / "pytorch_model.bin")
    (folder / SINGLE).unlink()


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (cut(-100), "not a whole safetensors file"),
    "truncated header": (cut(100), "not a whole safetensors file"),
    "empty": (cut(0), "not a whole safetensors file"),
    "header beyond the file": (
        lambda f: (f / SINGLE).write_bytes(b"\xff" * 5 + b"\0" * 3 + b"{}"), "not a whole"
    ),
    "number type": (patch(b'"F32"', b'"X32"'), "not a whole safetensors file"),
    "offsets": (patch(b'"data_offsets":[0,', b'"data_offsets":[8,'), "not a whole safetensors"),
    "integers": (
        lambda f: edit(f, lambda t: t.update({NORM: t[NORM].int()})), "'model.norm.weight' has type"
    ),
    "shape": (
        lambda f: edit(f, lambda t: t.update({NORM: t[NORM][:9].clone()})),
        re.escape("tensor 'model.norm.weight' has shape [9], the configuration asks for [64]"),
    ),
    "scalar": (lambda f: edit(f, lambda t: t.update({NORM: torch.tensor(1.0)})), "has shape"),
    "missing": (
        lambda f: edit(f, lambda t: t.pop("model.layers.1.mlp.up_proj.weight")),
        "tensor 'model.layers.1.mlp.up_proj.weight' is missing$",
    ),
    "renamed": (
        rename(NORM, "model.norn.weight"),
        "'model.norm.weight' is missing; it has 'model.norn.weight'",
    ),
    "unknown": (
        lambda f: edit(f, lambda t: t.update({"model.norm.bias": t[NORM].clone()})),
        "unknown tensor 'model.norm.bias'; the nearest known name is 'model.norm.weight'",
    ),
    "no head": (
        lambda f: edit(f, lambda t: t.pop("lm_head.weight")), "'lm_head.weight' is missing"
    ),
    "layers": (lambda f: set_config(f, num_hidden_layers=10**12), "tensors of 3 layers"),
    "sizes": (lambda f: set_config(f, intermediate_size=2**62), "exceed any machine"),
    "more sizes": (lambda f: set_config(f, vocab_size=10**30), "exceed any machine"),
    "pickle": (only_pickle, r"pytorch_model\.bin.*can run any code.*save_pretrained"),
    "no weights": (lambda f: (f / SINGLE).unlink(), "neither model.safetensors nor"),
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: is missing"),
    "config": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not readable as"),
    "deep config": (
        lambda f: (f / "config.json").write_text("[" * 10**5), r"config\.json: not readable as JSON"
    ),
    "config bytes": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "not readable as"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "expected a JSON object"),
    "other model": (lambda f: set_config(f, model_type="llama"), "'llama', expected 'qwen2'"),
    "rope": (lambda f: set_config(f, rope_scaling={"type": "linear"}), "rope scaling 'linear'"),
    "rope type": (lambda f: set_config(f, rope_scaling="linear"), "rope_scaling"),
    "vocabulary": (
        lambda f: edit(f, lambda t: shrink_vocabulary(f, t)), "token ids up to 259, but 200 embed"
    ),
}  # fmt: skip


def shrink_vocabulary(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    set_config(folder, vocab_size=200)
    for name in (EMBEDDING, "lm_head.weight"):
        tensors[name] = tensors[name][:200].clone()


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line(whole: Path, name: str) -> None:
    change, message = DAMAGE[name]
    change(whole)
    with pytest.raises(UserError, match=message) as caught:
        load(whole)
    assert str(caught.value).startswith(str(whole))
    assert "\n" not in str(caught.value)


def set_index(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


def duplicate(folder: Path) -> None:
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    one, other = (load_file(path) for path in (first, second))
    name = next(iter(one))
    save_file(other | {name: one[name]}, second)


SHARDS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "traversal": (lambda f: set_index(f, lambda m: m.update({NORM: "../x.safetensors"})), "beside"),
    "windows": (lambda f: set_index(f, lambda m: m.update({NORM: "..\\x.safetensors"})), "beside"),
    "absolute": (lambda f: set_index(f, lambda m: m.update({NORM: "/x.safetensors"})), "beside"),
    "pickle": (lambda f: set_index(f, lambda m: m.update({NORM: "x.bin"})), "'x.bin' is not"),
    "dots": (lambda f: set_index(f, lambda m: m.update({NORM: ".."})), "beside"),
    "nul": (lambda f: set_index(f, lambda m: m.update({NORM: "\0.safetensors"})), "is not"),
    "not there": (
        lambda f: set_index(f, lambda m: m.update({NORM: "x.safetensors"})), "which is not there"
    ),
    "no text": (lambda f: set_index(f, lambda m: m.update({NORM: 3})), "weight_map must"),
    "elsewhere": (
        lambda f: set_index(f, lambda m: m.update({NORM: m[EMBEDDING]})), "does not have it"
    ),
    "unlisted": (
        lambda f: set_index(f, lambda m: m.update({"model.extra": m[NORM]})), "does not have it"
    ),
    "twice": (duplicate, "is both in"),
    "no map": (lambda f: (f / INDEX).write_text("{}"), "weight_map must"),
    "no JSON": (lambda f: (f / INDEX).write_text("weights"), "not readable as JSON"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
def test_an_index_that_does_not_fit_is_one_clear_line(sharded: Path, name: str) -> None:
    change, message = SHARDS[name]
    change(sharded)
    with pytest.raises(UserError, match=message) as caught:
        load(sharded)
    assert "\n" not in str(caught.value)


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_damage_loads_or_is_a_user_error(whole: Path, data: st.DataObject) -> None:
    target = data.draw(st.sampled_from([SINGLE, SINGLE, "config.json"]))
    original = (whole / target).read_bytes()
    content = bytearray(original)
    header = min(len(content), 8 + int.from_bytes(content[:8], "little")) - 1
    if target != SINGLE:
        header = len(content) - 1
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content)))) :]
    (whole / target).write_bytes(content)
    message = ""
    try:
        load_model(whole)
    except UserError as error:
        message = str(error)
    finally:
        (whole / target).write_bytes(original)
    assert "\n" not in message


# --- names ----------------------------------------------------------------------------------------


def test_a_hub_name_is_fetched(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        calls.append((name, allow_patterns))
        return str(whole)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model, _ = qwen2.load("Qwen/Qwen2-0.5B")
    assert model.config.num_hidden_layers == 3
    [(name, patterns)] = calls
    assert name == "Qwen/Qwen2-0.5B"
    assert not any(Path("pytorch_model.bin").match(p) or Path("x.py").match(p) for p in patterns)
    for path in whole.iterdir():
        assert any(path.match(p) for p in patterns) or path.name == "x"


def test_an_existing_path_wins(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (whole.parent / "Qwen").mkdir()
    whole.rename(whole.parent / "Qwen" / "Qwen2-0.5B")
    monkeypatch.chdir(whole.parent)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert load_model("Qwen/Qwen2-0.5B").config.num_hidden_layers == 3


@pytest.mark.parametrize(
    "name", ["nowhere", "a/b/c", "/no/such", "Qwen/../x", "Qwen/none.gguf", "", "https://x.org/y"]
)
def test_what_is_neither_path_nor_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match="no such folder or file, and not a hub name"):
        load(name or "no where")


def test_a_file_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\x80\x02pickle")
    with pytest.raises(UserError, match="not a GGUF file"):
        load(tmp_path / "model.bin")


OFFLINE = """
import sys
from qwen2.common.errors import UserError
from qwen2.model.hub import load
print(load(sys.argv[1])[0].config.vocab_size)
try:
    load("Org/Absent")
except UserError as error:
    print(str(error))
"""


def test_the_hub_cache_serves_offline(whole: Path, tmp_path: Path) -> None:
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--Org--Model"
    snapshot, blobs = repository / "snapshots" / revision, repository / "blobs"
    for folder in (snapshot, blobs, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    for path in whole.iterdir():  # files are links to blobs, as the hub's client lays them out
        blob = hashlib.sha256(path.name.encode()).hexdigest()
        path.rename(blobs / blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)
    result = subprocess.run(
        [sys.executable, "-c", OFFLINE, "Org/Model"],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    size, *error = result.stdout.splitlines()
    assert size == "320"
    assert len(error) == 1
    assert error[0].startswith("Org/Absent: no such folder here, and not to be had from the hub")


def test_the_package_loads_without_importing_torch_first() -> None:
    code = "import sys, qwen2; assert 'torch' not in sys.modules; print(qwen2.load.__module__)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "qwen2.model.hub", result.stderr
