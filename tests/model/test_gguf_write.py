"""GGUF files that are written: read by us, by the gguf package and by llama.cpp."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from qwen2.common.errors import UserError
from qwen2.model.config import DualChunk, Mixture, ModelConfig, SlidingWindow, Yarn
from qwen2.model.decoder import Qwen2
from qwen2.model.gguf_write import TYPES, write_gguf
from qwen2.model.hub import load, load_model, open_checkpoint, save
from qwen2.model.quantise import quantise_model
from qwen2.tokenizer import Tokenizer

Reader = Callable[[Path], dict[str, torch.Tensor]]
QUANTISED = [kind for kind in TYPES if kind not in ("F32", "BF16", "F16")]
TERNARY = {"TQ1_0", "TQ2_0"}


@pytest.fixture
def routed(wide: ModelConfig) -> ModelConfig:
    """A mixture whose rows fill every type's blocks."""
    moe = Mixture(
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
    )
    return wide.model_copy(update={"moe": moe})


@pytest.fixture
def stored(
    tmp_path: Path, random_model: Callable[..., Qwen2], tokenizer: Tokenizer
) -> Callable[..., Path]:
    """A folder with a random model of a configuration."""

    def make(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Path:
        save(random_model(config, dtype), tokenizer, tmp_path / "source", overwrite=True)
        return tmp_path / "source"

    return make


def test_the_types_are_those_of_the_package() -> None:
    """All but those for weights that were trained in them."""
    row = np.ones((1, 256), np.float32)
    writable = set()
    for type_ in Type:
        try:
            gguf.quants.quantize(row, type_)
        except NotImplementedError:
            continue
        writable.add(type_.name)
    assert writable - TERNARY - {"MXFP4"} == set(TYPES)


@pytest.mark.parametrize("kind", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", ["wide", "routed"])
def test_a_plain_file_gives_the_model_back(
    shape: str,
    tied: bool,
    kind: str,
    tmp_path: Path,
    stored: Callable[..., Path],
    request: pytest.FixtureRequest,
) -> None:
    config = request.getfixturevalue(shape).model_copy(update={"tie_word_embeddings": tied})
    source = stored(config, torch.bfloat16)
    write_gguf(tmp_path / "model.gguf", open_checkpoint(source), kind)
    model, tokenizer = load(tmp_path / "model.gguf")
    true, true_tokenizer = load(source)
    expected = true.config.model_dump()
    if config.moe:  # llama.cpp wants a head there
        expected["tie_word_embeddings"] = False
    found = model.config.model_dump()
    for one in (found, expected):
        del one["eos_token_id"]
    assert found == expected
    state = model.state_dict()
    for name, tensor in true.state_dict().items():  # the least numbers of bf16 are below F16's
        atol = 2**-24 if kind == "F16" else 0
        torch.testing.assert_close(state[name], tensor, atol=atol, rtol=0)
    assert tokenizer == true_tokenizer
    assert tokenizer.merges == true_tokenizer.merges


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("shape", ["wide", "routed"])
def test_quantised_files_are_what_the_package_makes(
    shape: str,
    kind: str,
    tmp_path: Path,
    stored: Callable[..., Path],
    read_gguf: Reader,
    gguf_name: Callable[[str], str],
    request: pytest.FixtureRequest,
) -> None:
    """Through its reader; matrices are its own rounding of them, the rest stays in fp32."""
    source = stored(request.getfixturevalue(shape))
    path = tmp_path / "model.gguf"
    write_gguf(path, open_checkpoint(source), kind)
    found = read_gguf(path)
    true = load_model(source).state_dict()
    for name in list(true):
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), true.pop(name).chunk(2, dim=1), strict=True):
                true[name.replace("gate_up", part)] = half.contiguous()
    assert set(found) == {gguf_name(name) for name in true}
    for name, tensor in true.items():
        plain = tensor.ndim == 1 or ".mlp.gate." in name or "shared_expert_gate" in name
        small = name in ("model.embed_tokens.weight", "lm_head.weight")
        type_ = Type.F32 if plain else Type.Q8_0 if small else Type[kind]
        coded = gguf.quants.quantize(tensor.numpy(), type_)
        expected = torch.from_numpy(gguf.quants.dequantize(coded, type_)).view(tensor.shape)
        assert torch.equal(found[gguf_name(name)].view(tensor.shape), expected), name
    ours = load_model(path, dtype="fp32").state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in ours.values())


def test_rows_that_blocks_do_not_divide(
    tiny: ModelConfig, tmp_path: Path, stored: Callable[..., Path]
) -> None:
    """112 = 3.5 blocks: F16; rows of 64 are in the type that was asked for."""
    write_gguf(tmp_path / "model.gguf", open_checkpoint(stored(tiny)), "Q8_0")
    types = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert types["blk.0.ffn_down.weight"] == Type.F16
    assert types["blk.0.ffn_up.weight"] == Type.Q8_0
    assert load_model(tmp_path / "model.gguf").config.intermediate_size == 112


def test_the_metadata_llama_cpp_reads(
    wide: ModelConfig, tmp_path: Path, stored: Callable[..., Path], tokenizer: Tokenizer
) -> None:
    yarn = Yarn(factor=4, original_max_position_embeddings=32_768)
    config = wide.model_copy(update={"yarn": yarn, "max_position_embeddings": 131_072})
    write_gguf(tmp_path / "model.gguf", open_checkpoint(stored(config)), "Q8_0")
    fields = {k: f.contents() for k, f in gguf.GGUFReader(tmp_path / "model.gguf").fields.items()}
    expected: dict[str, Any] = {
        "general.architecture": "qwen2",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "qwen2.context_length": 131_072,
        "qwen2.block_count": 1,
        "qwen2.attention.head_count_kv": 2,
        "qwen2.rope.freq_base": 1e6,
        "qwen2.rope.scaling.type": "yarn",
        "qwen2.rope.scaling.factor": 4.0,
        "qwen2.rope.scaling.original_context_length": 32_768,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_id,
        "tokenizer.ggml.bos_token_id": tokenizer.end_of_text_id,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: fields[key] for key in expected} == expected
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert len(tokens) == len(types) == config.vocab_size
    assert (tokens[ord(" ")], tokens[256], tokens[257]) == ("Ġ", "ab", "<|endoftext|>")
    assert (types[0], types[257], types[260]) == (1, 3, 5)
    assert (tokens[260], tokens[-1]) == ("[PAD260]", "[PAD319]")
    assert load_model(tmp_path / "model.gguf").config.yarn == yarn


def test_a_template_and_user_defined_tokens_go_along(
    wide: ModelConfig, tmp_path: Path, random_model: Callable[..., Qwen2], tokenizer: Tokenizer
) -> None:
    own = Tokenizer(
        tokenizer.ranks,
        {**tokenizer.special_tokens, "<tool_call>": 262},
        "{{ messages[0].content }}",
        "<|im_end|>",
        user_defined=frozenset({"<tool_call>"}),
    )
    save(random_model(wide), own, tmp_path / "source")
    write_gguf(tmp_path / "model.gguf", open_checkpoint(tmp_path / "source"), "F16")
    assert load(tmp_path / "model.gguf")[1] == own


MOE = Mixture(
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=128,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dual_chunk": DualChunk(chunk_size=64, local_size=8)}, "dual chunk attention"),
        ({"sliding": SlidingWindow(size=8, layers=(0,))}, "sliding windows"),
        ({"moe": MOE.model_copy(update={"norm_topk_prob": True})}, "norm_topk_prob"),
        (
            {"moe": MOE.model_copy(update={"shared_expert_intermediate_size": 0})},
            "without shared experts",
        ),
        (
            {"yarn": Yarn(factor=4, original_max_position_embeddings=64, attention_factor=1.0)},
            "attention_factor",
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_what_llama_cpp_would_run_otherwise_is_refused(
    change: dict[str, Any],
    message: str,
    wide: ModelConfig,
    tmp_path: Path,
    stored: Callable[..., Path],
) -> None:
    source = stored(wide.model_copy(update=change))
    with pytest.raises(UserError, match=f"cannot be written as GGUF: .*{message}"):
        write_gguf(tmp_path / "model.gguf", open_checkpoint(source), "F16")
    assert not (tmp_path / "model.gguf").exists()


def test_a_type_that_cannot_be_written(
    wide: ModelConfig, tmp_path: Path, stored: Callable[..., Path]
) -> None:
    with pytest.raises(UserError, match=r"Q4_K_M: cannot be written.*Q8_0.*llama-quantize"):
        write_gguf(tmp_path / "model.gguf", open_checkpoint(stored(wide)), "Q4_K_M")


def test_quantised_folders_are_refused(
    wide: ModelConfig, tmp_path: Path, random_model: Callable[..., Qwen2], tokenizer: Tokenizer
) -> None:
    save(quantise_model(random_model(wide), "int8"), tokenizer, tmp_path / "source")
    with pytest.raises(UserError, match="its weights are quantised"):
        write_gguf(tmp_path / "model.gguf", open_checkpoint(tmp_path / "source"), "Q8_0")


def test_nothing_is_overwritten_and_nothing_half_written_stays(
    wide: ModelConfig,
    tmp_path: Path,
    stored: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint, target = open_checkpoint(stored(wide)), tmp_path / "out" / "model.gguf"
    target.parent.mkdir()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(gguf.quants, "quantize", fail)
        with pytest.raises(UserError, match="the disk is full"):
            write_gguf(target, checkpoint, "Q8_0")
    assert list(target.parent.iterdir()) == []
    write_gguf(target, checkpoint, "Q8_0")
    before = target.read_bytes()
    with pytest.raises(UserError, match="exists already"):
        write_gguf(target, checkpoint, "F16")
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["model.gguf"]


def test_a_file_of_many_blocks(
    wide: ModelConfig,
    tmp_path: Path,
    stored: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = open_checkpoint(stored(wide))
    write_gguf(tmp_path / "whole.gguf", checkpoint, "Q8_0")
    monkeypatch.setattr("qwen2.model.gguf_write._BLOCK", 1000)
    monkeypatch.setattr("qwen2.model.weights.PLAIN_BLOCK", 512)
    write_gguf(tmp_path / "parts.gguf", checkpoint, "Q8_0")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "parts.gguf").read_bytes()


# llama.cpp

SERVER = "LLAMA_SERVER"
PROMPT = "The quick brown fox jumps over the lazy dog. The quick brown fox"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BF16", "F16", "Q8_0", "Q4_1"])
def test_llama_cpp_says_the_same(real_checkpoint: Path, tmp_path: Path, kind: str) -> None:
    """Greedy text of both, where `LLAMA_SERVER` names llama.cpp's server."""
    from qwen2.inference import Engine, SamplingParams

    if not os.environ.get(SERVER):
        pytest.skip(f"{SERVER} is not set: it names llama.cpp's llama-server")
    path = tmp_path / "model.gguf"
    write_gguf(path, open_checkpoint(real_checkpoint), kind)
    model, tokenizer = load(path, dtype="bf16" if kind == "BF16" else "fp32")
    (completion,) = Engine(model, tokenizer).generate([PROMPT], SamplingParams(max_tokens=32))
    with llama_server(path) as address:
        theirs = complete(address, PROMPT, 32)
    assert theirs == completion.text


@contextmanager
def llama_server(path: Path) -> Iterator[str]:
    """llama.cpp's server with the file at `path`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [os.environ[SERVER], "-m", str(path), "--port", str(port), "-c", "512", "-t", "2"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                assert server.poll() is None, "llama-server ended"
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


def complete(address: str, prompt: str, count: int) -> str:
    """Greedy text from llama.cpp's server."""
    body = {"prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False}
    request = urllib.request.Request(
        f"{address}/completion",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        text: str = json.load(answer)["content"]
    return text
