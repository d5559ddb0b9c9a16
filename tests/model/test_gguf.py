"""GGUF files: what they hold comes back; what cannot be is refused in one line."""

from __future__ import annotations

import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig, Yarn
from qwen2.model.dequantise import can_dequantise
from qwen2.model.hub import load, load_config, load_model

Writer = Callable[..., None]
Reader = Callable[[Path], dict[str, torch.Tensor]]


@pytest.fixture
def whole(tmp_path: Path, wide: ModelConfig, write_gguf: Writer) -> Path:
    path = tmp_path / "whole.gguf"
    write_gguf(path, wide)
    return path


@pytest.mark.parametrize("type_", filter(can_dequantise, Type), ids=lambda t: t.name)
def test_every_type_equals_gguf_reader(
    tmp_path: Path,
    wide: ModelConfig,
    write_gguf: Writer,
    read_gguf: Reader,
    gguf_name: Callable[[str], str],
    type_: Type,
) -> None:
    path = tmp_path / "model.gguf"
    with np.errstate(all="ignore"):  # random bytes make infinite scales
        write_gguf(path, wide, type_)
        expected = read_gguf(path)
        model = load_model(path, dtype="fp32")
        half = load_model(path)
    assert half.dtype == torch.bfloat16
    assert len(expected) == len(model.state_dict())
    for name, tensor in model.state_dict().items():
        same = {"rtol": 0, "atol": 0, "equal_nan": True}
        other = expected[gguf_name(name)]
        torch.testing.assert_close(tensor, other, **same)
        torch.testing.assert_close(half.state_dict()[name], other.bfloat16(), **same)


@pytest.mark.parametrize("tied", [False, True])
def test_configuration_and_tokenizer_come_from_the_file(
    tmp_path: Path, wide: ModelConfig, write_gguf: Writer, tied: bool
) -> None:
    config = wide.model_copy(update={"tie_word_embeddings": tied, "rope_theta": 10_000.0})
    write_gguf(tmp_path / "model.gguf", config, Type.Q8_0)
    model, tokenizer = load(tmp_path / "model.gguf")
    assert model.config == config.model_copy(update={"eos_token_id": 259})
    assert load_config(tmp_path / "model.gguf") == model.config
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert tokenizer.encode("Aab") == [65, 256]
    assert (tokenizer.eos_id, tokenizer.pad_id) == (259, 257)
    assert tokenizer.chat_template == "{{ messages[0].content }}"


def test_writing_to_mapped_parameters_leaves_the_file(whole: Path) -> None:
    before = whole.read_bytes()
    model = load_model(whole, dtype="fp32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7)
    assert whole.read_bytes() == before
    assert load_model(whole, dtype="fp32").model.norm.weight[0] != 7


Change = Callable[[bytes], bytes]


def number(after: bytes, skip: int, kind: str, value: int) -> Change:
    """Put `value` at `skip` bytes after the only place of `after`."""

    def change(data: bytes) -> bytes:
        offset = data.index(after) + len(after) + skip
        new = struct.pack("<" + kind, value)
        return data[:offset] + new + data[offset + len(new) :]

    return change


NORM = b"output_norm.weight"  # 1 dimension: u32 count, u64 size, u32 type, u64 offset
DAMAGE: dict[str, tuple[Change, str]] = {
    "empty": (lambda data: b"", "cannot be read"),
    "magic": (lambda data: b"GGML" + data[4:], "not a GGUF file"),
    "version": (number(b"GGUF", 0, "I", 1), "GGUF version 1"),
    "big endian": (lambda data: data[:4] + data[7:3:-1] + data[8:], "GGUF version"),
    "tensor count": (number(b"GGUF", 4, "Q", 2**60), "cut short or damaged"),
    "field count": (number(b"GGUF", 12, "Q", 2**63), "cut short or damaged"),
    "key length": (number(b"GGUF", 20, "Q", 2**62), "cut short or damaged"),
    "array length": (number(b"tokenizer.ggml.tokens", 8, "Q", 2**40), "cut short or damaged"),
    "number array": (number(b"tokenizer.ggml.token_type", 8, "Q", 2**40), "cut short"),
    "string length": (number(b"tokenizer.ggml.tokens", 16, "Q", 2**50), "cut short or damaged"),
    "field type": (number(b"tokenizer.ggml.eos_token_id", 0, "I", 99), "unknown metadata type 99"),
    "nested array": (number(b"tokenizer.ggml.tokens", 4, "I", 9), "unknown metadata type 9"),
    "wrong field type": (number(b"qwen2.block_count", 0, "I", 6), "must be of type int"),
    "text": (number(b"tokenizer.ggml.tokens", 24, "B", 0xFF), "no readable string"),
    "dimensions": (number(NORM, 0, "I", 5), "has 5 dimensions"),
    "shape": (number(NORM, 4, "Q", 128), re.escape("has shape [128], the configuration asks for")),
    "huge shape": (number(NORM, 4, "Q", 2**63), "the file"),
    "tensor type": (number(NORM, 12, "I", 250), "has the unknown type 250"),
    "integers": (number(NORM, 12, "I", Type.I32.value), "weights of type I32"),
    "offset": (number(NORM, 16, "Q", 2**40), "ends at byte"),
    "unaligned": (number(NORM, 16, "Q", 33), "multiple of 32"),
    "overlap": (number(NORM, 16, "Q", 0), "overlaps"),
    "name": (lambda data: data.replace(NORM, b"output_norn.weight"), "'model.norm.weight' is miss"),
    "twice": (lambda data: data.replace(b"blk.0.attn_k.bias", b"blk.0.attn_q.bias"), "twice"),
    "same key": (lambda data: data.replace(b"qwen2.block_count", b"qwen2.embed_count"), "missing"),
    "layers": (number(b"qwen2.block_count", 4, "I", 2**31), "asks for 2147483648"),
    "heads": (number(b"qwen2.attention.head_count", 4, "I", 3), "multiple of num_attention_heads"),
    "no heads": (number(b"qwen2.attention.head_count", 4, "I", 0), "num_attention_heads"),
    "tokenizer": (lambda data: data.replace(b"gpt2", b"bert"), "kind 'bert'"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_clear_line(whole: Path, name: str) -> None:
    change, message = DAMAGE[name]
    whole.write_bytes(change(whole.read_bytes()))
    tracemalloc.start()
    with pytest.raises(UserError, match=message) as caught:
        load(whole)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000  # a count in the file is not a reason to allocate
    assert str(caught.value).startswith(str(whole))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.999])
def test_a_truncated_file_is_refused(whole: Path, share: float) -> None:
    data = whole.read_bytes()
    whole.write_bytes(data[: max(5, int(len(data) * share))])
    with pytest.raises(UserError, match="cut short"):
        load_model(whole)


def test_other_architectures_are_named(
    tmp_path: Path, wide: ModelConfig, write_gguf: Writer
) -> None:
    write_gguf(tmp_path / "model.gguf", wide, architecture="llama")
    with pytest.raises(UserError, match="architecture 'llama', expected 'qwen2' or 'qwen2moe'"):
        load_model(tmp_path / "model.gguf")


def test_the_vocabulary_must_fit_the_embedding(
    tmp_path: Path, wide: ModelConfig, write_gguf: Writer
) -> None:
    write_gguf(tmp_path / "model.gguf", wide, vocabulary=300)
    with pytest.raises(UserError, match="vocabulary of 300 tokens, but 320 embeddings"):
        load_model(tmp_path / "model.gguf")


YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, Yarn(factor=4, original_max_position_embeddings=512)),
        (
            {"rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.0},
            Yarn(factor=4, original_max_position_embeddings=128),
        ),
        (
            {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0},
            Yarn(factor=4, original_max_position_embeddings=512, beta_fast=16, beta_slow=2),
        ),
    ],
)
def test_yarn_is_read(
    tmp_path: Path, wide: ModelConfig, write_gguf: Writer, extra: dict[str, Any], expected: Yarn
) -> None:
    write_gguf(tmp_path / "model.gguf", wide, extra=YARN | extra)
    assert load_config(tmp_path / "model.gguf").yarn == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rope.scaling.type": "linear"}, "rope scaling 'linear'"),
        ({"rope.scaling.type": "yarn"}, "key 'factor' is missing"),
        (
            YARN | {"rope.scaling.attn_factor": 0.5},
            r"qwen2\.rope\.scaling\.attn_factor is 0\.5; only 1",
        ),
        (YARN | {"rope.scaling.yarn_log_multiplier": 0.1}, "yarn_log_multiplier is 0.1; only 0 is"),
        (YARN | {"rope.scaling.factor": 4}, "must be of type float"),
    ],
)
def test_other_scalings_of_rotations_are_refused(
    tmp_path: Path, wide: ModelConfig, write_gguf: Writer, extra: dict[str, Any], message: str
) -> None:
    write_gguf(tmp_path / "model.gguf", wide, extra=extra)
    with pytest.raises(UserError, match=message) as caught:
        load_model(tmp_path / "model.gguf")
    assert "\n" not in str(caught.value)


@pytest.fixture
def wide_mixture(wide: ModelConfig, mixture: ModelConfig) -> ModelConfig:
    """Experts of different heights, all of rows of 256."""
    assert mixture.moe is not None
    sizes = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 512}
    return wide.model_copy(update={"moe": mixture.moe.model_copy(update=sizes)})


@pytest.mark.parametrize("type_", [Type.F32, Type.BF16, Type.Q8_0, Type.Q4_K, Type.Q6_K])
def test_a_mixture_equals_gguf_reader(
    tmp_path: Path,
    wide_mixture: ModelConfig,
    write_gguf: Writer,
    read_gguf: Reader,
    gguf_name: Callable[[str], str],
    type_: Type,
) -> None:
    path = tmp_path / "model.gguf"
    with np.errstate(all="ignore"):
        write_gguf(path, wide_mixture, type_)
        expected = read_gguf(path)
        model = load_model(path, dtype="fp32")
        half = load_model(path)
    assert model.config == wide_mixture.model_copy(update={"eos_token_id": 259})
    assert len(expected) == len(model.state_dict()) + 1  # gate and up lie apart
    for name, tensor in model.state_dict().items():
        if name.endswith("gate_up_proj"):
            parts = [expected[gguf_name(name.replace("gate_up", part))] for part in ("gate", "up")]
            other = torch.cat(parts, dim=1)
        else:
            other = expected[gguf_name(name)].view(tensor.shape)
        same = {"rtol": 0, "atol": 0, "equal_nan": True}
        torch.testing.assert_close(tensor, other, **same)
        torch.testing.assert_close(half.state_dict()[name], other.bfloat16(), **same)


def test_the_gate_of_shared_experts_may_be_a_matrix(
    tmp_path: Path, wide_mixture: ModelConfig, write_gguf: Writer
) -> None:
    def widen(arrays: dict[str, np.ndarray]) -> None:
        arrays["blk.0.ffn_gate_inp_shexp.weight"] = arrays["blk.0.ffn_gate_inp_shexp.weight"][None]

    write_gguf(tmp_path / "vector.gguf", wide_mixture)
    write_gguf(tmp_path / "matrix.gguf", wide_mixture, change=widen)
    gates = [
        load_model(tmp_path / f"{kind}.gguf").model.layers[0].mlp.shared_expert_gate.weight
        for kind in ("vector", "matrix")
    ]
    assert gates[0].shape == (1, 256)
    assert torch.equal(*gates)


def test_a_mixture_without_its_stacks_names_what_is_missing(
    tmp_path: Path, wide_mixture: ModelConfig, write_gguf: Writer
) -> None:
    def remove(arrays: dict[str, np.ndarray]) -> None:
        del arrays["blk.0.ffn_up_exps.weight"]

    write_gguf(tmp_path / "model.gguf", wide_mixture, change=remove)
    with pytest.raises(UserError, match=r"'model\.layers\.0\.mlp\.experts\.up_proj' is missing$"):
        load_model(tmp_path / "model.gguf")


def test_an_unknown_tensor_is_named(tmp_path: Path, wide: ModelConfig, write_gguf: Writer) -> None:
    def add(arrays: dict[str, np.ndarray]) -> None:
        arrays["blk.0.attn_r.weight"] = np.zeros((256, 256), np.float32)

    write_gguf(tmp_path / "model.gguf", wide, change=add)
    with pytest.raises(UserError, match=r"unknown tensor 'blk\.0\.attn_r\.weight'"):
        load_model(tmp_path / "model.gguf")


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_damage_loads_or_is_a_user_error(whole: Path, data: st.DataObject) -> None:
    content = bytearray(whole.read_bytes())
    header = content.index(NORM) + 64
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content)))) :]
    damaged = whole.with_name("damaged.gguf")
    damaged.write_bytes(content)
    message = ""
    try:
        load(damaged)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
