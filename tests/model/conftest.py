"""Small checkpoints to load: random models, a tokenizer of single bytes, GGUF files."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from qwen2.model.config import Mixture, ModelConfig
from qwen2.model.decoder import Qwen2
from qwen2.tokenizer import Tokenizer

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Bytes and "ab"; ends as an instruct model does, at <|im_end|>."""
    return Tokenizer.from_ranks(
        {bytes([i]): i for i in range(256)} | {b"ab": 256},
        {token: 257 + i for i, token in enumerate(CONTROL)},
        eos="<|im_end|>",
    )


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Qwen2]:
    """A model whose every parameter is random: norms and biases too."""

    def make(config: ModelConfig, dtype: torch.dtype = torch.float32) -> Qwen2:
        generator = torch.Generator().manual_seed(3)
        model = Qwen2(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.1, 0.2, generator=generator)
        return model.to(dtype)

    return make


@pytest.fixture
def wide(tiny: ModelConfig) -> ModelConfig:
    """Rows of 256, so that every quantised type's blocks fit into them."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
    return tiny.model_copy(update=sizes)


@pytest.fixture
def mixture(tiny: ModelConfig) -> ModelConfig:
    """The miniature with 8 routed experts of which 3, and shared ones."""
    moe = Mixture(
        num_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=40,
    )
    return tiny.model_copy(update={"moe": moe})


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., None]:
    return _write_gguf


@pytest.fixture(scope="session")
def read_gguf() -> Callable[[Path], dict[str, torch.Tensor]]:
    return _read_gguf


@pytest.fixture(scope="session")
def gguf_name() -> Callable[[str], str]:
    return _gguf_name


def _write_gguf(
    path: Path,
    config: ModelConfig,
    type_: Type = Type.F32,
    *,
    vocabulary: int | None = None,
    architecture: str | None = None,
    change: Callable[[dict[str, np.ndarray]], None] | None = None,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write a random model with matrices of `type_`, by the gguf package's own writer."""
    own = "qwen2moe" if config.moe else "qwen2"
    writer = gguf.GGUFWriter(path, architecture or own)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_vocabulary(writer, vocabulary or config.vocab_size)
    if config.moe:
        writer.add_expert_count(config.moe.num_experts)
        writer.add_expert_used_count(config.moe.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.moe.shared_expert_intermediate_size)
    adders = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}
    for key, value in (extra or {}).items():
        adders[type(value)](f"{own}.{key}", value)
    rng = np.random.default_rng(0)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Qwen2(config).named_parameters()}
    arrays = {}
    for name, shape in shapes.items():
        array = rng.normal(0.1, 0.2, tuple(shape)).astype(np.float32)
        if name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                arrays[_gguf_name(name.replace("gate_up", part))] = np.ascontiguousarray(half)
        else:  # the converter stores the gate of the shared experts as a vector
            gate = name.endswith("shared_expert_gate.weight")
            arrays[_gguf_name(name)] = array[0] if gate else array
    if change:
        change(arrays)
    for name, array in arrays.items():
        kind = type_ if array.ndim > 1 and "ffn_gate_inp" not in name else Type.F32
        writer.add_tensor(name, _stored(array, kind, rng), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_gguf(path: Path) -> dict[str, torch.Tensor]:
    """What the gguf package's own reader makes of a file, by its names."""
    tensors = gguf.GGUFReader(path).tensors
    numbers = [np.array(gguf.quants.dequantize(t.data, t.tensor_type)) for t in tensors]
    shapes = [tuple(int(n) for n in reversed(t.shape)) for t in tensors]
    return {
        t.name: torch.from_numpy(array).view(shape)
        for t, array, shape in zip(tensors, numbers, shapes, strict=True)
    }


def _add_vocabulary(writer: gguf.GGUFWriter, size: int) -> None:
    """The vocabulary of `tokenizer` in the GPT-2 spelling, padded to the embedding's rows."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    spelling = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokens = [*(spelling[b] for b in range(256)), "ab", *CONTROL]
    types = [1] * 257 + [3] * 3
    pads = [f"[PAD{i}]" for i in range(len(tokens), size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens + pads)
    writer.add_token_types(types + [5] * len(pads))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(259)
    writer.add_pad_token_id(257)
    writer.add_chat_template("{{ messages[0].content }}")


def _stored(array: np.ndarray, kind: Type, rng: np.random.Generator) -> np.ndarray:
    """`array` in its type, where the package can quantise to it, else random bytes."""
    try:
        return gguf.quants.quantize(array, kind)
    except NotImplementedError:
        shape = gguf.quants.quant_shape_to_byte_shape(array.shape, kind)
        return rng.integers(0, 256, shape, dtype=np.uint8)


def _gguf_name(name: str) -> str:
    """llama.cpp's name of a published one or a stack, as the gguf package has it."""
    if not name.endswith((".weight", ".bias")):
        name += ".weight"
    module, kind = name.rsplit(".", 1)
    found = (modules.get_name(module) for modules in _gguf_modules())
    return f"{next(filter(None, found))}.{kind}"


@cache
def _gguf_modules() -> list[gguf.TensorNameMap]:
    architectures = gguf.MODEL_ARCH.QWEN2, gguf.MODEL_ARCH.QWEN2MOE
    return [gguf.get_tensor_name_map(architecture, 16) for architecture in architectures]
