"""Checkpoints as GGUF files, which llama.cpp and what is built on it run.

Metadata and the types of single tensors are those of llama.cpp's own converter. The `gguf` package
does the rounding; types that it cannot write (the K-quants) are made from a BF16 file by
llama.cpp's `llama-quantize`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.constants import GGML_QUANT_SIZES
from torch import Tensor

from qwen2.common.errors import UserError
from qwen2.common.files import durable_file
from qwen2.common.progress import Progress
from qwen2.common.runtime import in_threads
from qwen2.model.config import ModelConfig, Yarn
from qwen2.model.gguf_names import ARCHITECTURES, MIXTURE_SIZES, SIZES, gguf_name
from qwen2.model.hf_config import DENSE, MIXTURE
from qwen2.model.stacks import Joined, Piece
from qwen2.model.stored import StoredTensor
from qwen2.model.weights import EMBEDDING, HEAD, checked, row_blocks

if TYPE_CHECKING:
    from qwen2.model.hub import Checkpoint
    from qwen2.tokenizer import Tokenizer

TYPES = ("F32", "BF16", "F16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""What can be written. The package knows ternary types and MXFP4 as well: they are for weights that
were trained in them, and others lose all sense."""

_PLAIN = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
_BLOCK = 1 << 24  # elements that are encoded before they are written


def write_gguf(path: Path, checkpoint: Checkpoint, type_: str) -> None:
    """Write `checkpoint` to `path`, its matrices in `type_`, tensor by tensor; whole or not at all.

    Vectors and routers stay in fp32. With less than 8 bits, embedding and head are in Q8_0, and
    rows that a type's blocks do not divide are in F16.

    Raises:
        UserError: `path` exists, the disk is full, an unknown type, or a model that llama.cpp would
            run otherwise than this package does.
    """
    if type_ not in TYPES:
        raise UserError(
            f"{type_}: cannot be written; choose one of {', '.join(TYPES)}. llama.cpp's "
            "llama-quantize makes others from a BF16 file"
        )
    config, tokenizer = checkpoint.config, checkpoint.tokenizer()
    _check_runnable(config, checkpoint.path)
    _, parameters = checked(config, checkpoint.tensors, checkpoint.path)
    if config.moe and config.tie_word_embeddings:  # there llama.cpp wants a head
        parameters[HEAD] = parameters[EMBEDDING]
    sources = dict(_apart(parameters))
    kinds = {name: _type_of(name, sources[name].shape, Type[type_]) for name in sources}
    with durable_file(path) as partial:
        architecture = next(
            name
            for name, kind in ARCHITECTURES.items()
            if kind == (MIXTURE if config.moe else DENSE)
        )
        writer = gguf.GGUFWriter(partial, architecture)
        _add_config(writer, config, checkpoint.path.stem, type_)
        _add_tokenizer(writer, tokenizer, config.vocab_size)
        for name, source in sources.items():
            shape = _shape_in_file(name, source.shape)
            size = prod(shape[:-1]) * _row_bytes(shape[-1], kinds[name])
            writer.add_tensor_info(
                gguf_name(name), shape, np.dtype(np.float32), size, raw_dtype=kinds[name]
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with partial.open("ab") as file, Progress(type_, len(sources)) as progress:
            for number, (name, source) in enumerate(sources.items(), 1):
                _pad(file, writer.data_alignment)
                for block in _encoded(source, kinds[name]):
                    file.write(block.data)
                progress.update(number)
            _pad(file, writer.data_alignment)


def _check_runnable(config: ModelConfig, where: Path) -> None:
    """What GGUF's metadata cannot say, or llama.cpp does not do, must not be lost in silence."""
    reasons = {
        "its weights are quantised; convert the original": config.quantisation,
        "llama.cpp has no dual chunk attention": config.dual_chunk,
        "llama.cpp has no sliding windows in this architecture": config.sliding,
        "llama.cpp has no norm_topk_prob in this architecture": (
            config.moe and config.moe.norm_topk_prob
        ),
        "llama.cpp has no mixture without shared experts": (
            config.moe and not config.moe.shared_expert_intermediate_size
        ),
        "llama.cpp has no attention_factor or truncate for YARN": (
            config.yarn and (config.yarn.attention_factor is not None or not config.yarn.truncate)
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{where}: cannot be written as GGUF: {reason}")


def _apart(parameters: Mapping[str, StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Tensors as GGUF has them: the gates and the ups of experts are stacks of their own."""
    for name, source in parameters.items():
        if not name.endswith(".experts.gate_up_proj"):
            yield name, source
            continue
        E, rows, C = source.shape
        for number, part in enumerate(("gate_proj", "up_proj")):
            pieces = [
                Piece(name, source.shape, expert * rows + number * rows // 2, rows // 2)
                for expert in range(E)
            ]
            own = name.replace("gate_up_proj", part)
            yield own, Joined((E, rows // 2, C), pieces, parameters)


def _type_of(name: str, shape: tuple[int, ...], wanted: Type) -> Type:
    if len(shape) == 1 or name.endswith((".mlp.gate.weight", ".shared_expert_gate.weight")):
        return Type.F32
    block, size = GGML_QUANT_SIZES[wanted]
    if name in (EMBEDDING, HEAD) and 8 * size < 8 * block:
        wanted = Type.Q8_0
    return Type.F16 if shape[-1] % GGML_QUANT_SIZES[wanted][0] else wanted


def _shape_in_file(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """llama.cpp's converter stores the gate of the shared experts, (1, C), as a vector."""
    return shape[1:] if name.endswith(".shared_expert_gate.weight") else shape


def _row_bytes(width: int, type_: Type) -> int:
    block, size = GGML_QUANT_SIZES[type_]
    return width // block * size


def _encoded(source: StoredTensor, type_: Type) -> Iterator[np.ndarray]:
    """The bytes of a tensor, some rows after the other."""
    *outer, width = source.shape
    rows = prod(outer) if outer else 1
    step = max(1, _BLOCK // width)
    for begin in range(0, rows, step):
        count = min(step, rows - begin)
        out = np.empty((count, _row_bytes(width, type_)), np.uint8)

        def encode(start: int, some: int, begin: int = begin, out: np.ndarray = out) -> None:
            numbers = torch.empty(some, width)
            source.read_rows(begin + start, numbers if outer else numbers[0])
            out[start : start + some] = _encode(numbers, type_)

        blocks = row_blocks(source)
        size = blocks[0][1] if outer else 1
        in_threads(encode, [(i, min(size, count - i)) for i in range(0, count, size)])
        yield out


def _encode(numbers: Tensor, type_: Type) -> np.ndarray:
    """fp32 (rows, width) -> bytes (rows, ...)."""
    if type_ in _PLAIN:
        return numbers.to(_PLAIN[type_]).view(torch.uint8).numpy()
    return gguf.quants.quantize(numbers.numpy(), type_)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _add_config(writer: gguf.GGUFWriter, config: ModelConfig, name: str, type_: str) -> None:
    own = writer.arch
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(
        gguf.LlamaFileType["ALL_F32" if type_ == "F32" else f"MOSTLY_{type_}"].value
    )
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for field, key in SIZES.items():
        writer.add_uint32(f"{own}.{key}", getattr(config, field))
    if config.moe:
        for field, key in MIXTURE_SIZES.items():
            writer.add_uint32(f"{own}.{key}", getattr(config.moe, field))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    if config.yarn:
        _add_yarn(writer, config.yarn)


def _add_yarn(writer: gguf.GGUFWriter, yarn: Yarn) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
    writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, size: int) -> None:
    from qwen2.tokenizer.files import gguf_fields

    tokens, types, merges = gguf_fields(tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_bos_token_id(tokenizer.special_tokens.get("<|endoftext|>", tokenizer.eos_id))
    writer.add_add_bos_token(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
