"""Checkpoints in GGUF files: weights, configuration, vocabulary and chat template in one.

Tensors keep llama.cpp's names in the file and get the published ones here. The architectures
`qwen2` and `qwen2moe` pair the units of a head as the published checkpoints do, so nothing is
permuted.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from qwen2.common.config import one_line
from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig
from qwen2.model.dequantise import can_dequantise, dequantise
from qwen2.model.gguf_header import TensorInfo, read_header
from qwen2.model.gguf_names import ARCHITECTURES, MIXTURE_SIZES, SIZES, published_name
from qwen2.model.hf_config import DENSE, config_from_hf
from qwen2.model.weights import EMBEDDING, HEAD

if TYPE_CHECKING:
    from qwen2.tokenizer import Tokenizer

_REQUIRED = object()

_IGNORED = {"rope_freqs.weight"}  # factors of scalings other than YARN, which are refused

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

# Scales of YARN's temperature and of its ramp: with these values, they change nothing.
_PLAIN_YARN = {
    "attn_factor": 1.0,
    "yarn_attn_factor": 1.0,
    "yarn_ext_factor": 1.0,
    "yarn_log_multiplier": 0.0,
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a mapped GGUF file."""

    path: Path
    data: mmap.mmap
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest dimension first."""
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype | None:
        """None for quantised types."""
        return _PLAIN.get(self.info.type.name)

    def mapped(self) -> Tensor:
        """A private mapping of the file."""
        assert self.dtype is not None
        count = torch.Size(self.shape).numel()
        flat = torch.frombuffer(self.data, dtype=self.dtype, count=count, offset=self.info.offset)
        return flat.view(self.shape)

    def read_rows(self, start: int, out: Tensor) -> None:
        """Convert or dequantise rows; mapped anew, so that their pages leave with the mapping."""
        rows = len(out) if out.ndim > 1 else 1  # a vector is one row of blocks
        first, size = self.info.offset + start * self.info.row_bytes, rows * self.info.row_bytes
        before = first % mmap.ALLOCATIONGRANULARITY
        data = _map(self.path, first - before, before + size)
        raw = torch.frombuffer(data, dtype=torch.uint8, offset=before).view(rows, -1)
        numbers = dequantise(raw, self.info.type) if self.dtype is None else raw.view(self.dtype)
        out.copy_(numbers.view(out.shape))


class GGUFFile:
    """A GGUF file, mapped and checked; nothing but its header is read.

    Raises:
        UserError: not a whole GGUF file, or one of another architecture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        data = _map(path)
        header = read_header(path, data)
        data.madvise(mmap.MADV_DONTNEED)  # the header's pages are done with
        self._fields = header.fields
        self.architecture = self._field("general.architecture", str)
        if self.architecture not in ARCHITECTURES:
            known = " or ".join(map(repr, ARCHITECTURES))
            raise UserError(
                f"{path}: a model of architecture {self.architecture!r}, expected {known}"
            )
        self.tensors = {
            published_name(name): GGUFTensor(path, data, _as_matrix(name, info))
            for name, info in header.tensors.items()
            if name not in _IGNORED
        }
        for tensor in self.tensors.values():
            if tensor.dtype is None and not can_dequantise(tensor.info.type):
                raise UserError(f"{path}: weights of type {tensor.info.type.name} are not readable")

    def config(self) -> ModelConfig:
        """The model's shape, from the metadata; the vocabulary's size is the embedding's."""
        kind = ARCHITECTURES[self.architecture]
        sizes = SIZES if kind == DENSE else SIZES | MIXTURE_SIZES
        values = {name: self._own(key, int) for name, key in sizes.items()}
        embedding = self.tensors.get(EMBEDDING)
        if embedding is None:
            raise UserError(f"{self.path}: tensor 'token_embd.weight' is missing")
        tokens = len(self._field("tokenizer.ggml.tokens", list))
        if tokens != embedding.shape[0]:
            raise UserError(
                f"{self.path}: a vocabulary of {tokens} tokens, but {embedding.shape[0]} embeddings"
            )
        return config_from_hf(
            values
            | {
                "model_type": kind,
                "vocab_size": embedding.shape[0],
                "rms_norm_eps": _meant(self._own("attention.layer_norm_rms_epsilon", float)),
                "rope_theta": self._own("rope.freq_base", float, 10_000.0),
                "rope_scaling": self._rope_scaling(),
                "tie_word_embeddings": HEAD not in self.tensors,
                "eos_token_id": self._field("tokenizer.ggml.eos_token_id", int, None),
            },
            str(self.path),
        )

    def tokenizer(self) -> Tokenizer:
        """The vocabulary, control tokens and chat template of the file."""
        from qwen2.tokenizer import Tokenizer

        kind = self._field("tokenizer.ggml.model", str)
        if kind != "gpt2":
            raise UserError(f"{self.path}: a tokenizer of kind {kind!r}, expected 'gpt2'")
        return Tokenizer.from_gguf_fields(
            self._strings("tokenizer.ggml.tokens"),
            self._field("tokenizer.ggml.token_type", list),
            self._strings("tokenizer.ggml.merges"),
            self._field("tokenizer.chat_template", str, None),
            self._field("tokenizer.ggml.eos_token_id", int, None),
            self._field("tokenizer.ggml.padding_token_id", int, None),
        )

    def _rope_scaling(self) -> dict[str, Any] | None:
        """YARN as llama.cpp has it, in the words of config.json."""
        kind = self._own("rope.scaling.type", str, "none")
        if kind == "none":
            return None
        for key, plain in _PLAIN_YARN.items():
            if (value := self._own(f"rope.scaling.{key}", float, plain)) != plain:
                name = f"{self.architecture}.rope.scaling.{key}"
                raise UserError(f"{self.path}: {name} is {value:g}; only {plain:g} is known")
        given = {
            "factor": self._own("rope.scaling.factor", float, None),
            "original_max_position_embeddings": self._own(
                "rope.scaling.original_context_length", int, None
            ),
            "beta_fast": self._own("rope.scaling.yarn_beta_fast", float, None),
            "beta_slow": self._own("rope.scaling.yarn_beta_slow", float, None),
        }
        return {"rope_type": kind} | {k: v for k, v in given.items() if v is not None}

    def _own(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The field `key` of the architecture."""
        return self._field(f"{self.architecture}.{key}", kind, default)

    def _strings(self, key: str) -> list[str]:
        values: list[str] = self._field(key, list)
        if not all(isinstance(value, str) for value in values):
            raise UserError(f"{self.path}: metadata key {key!r} must be a list of strings")
        return values

    def _field(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        value = self._fields.get(key, default)
        if value is _REQUIRED:
            raise UserError(f"{self.path}: metadata key {key!r} is missing")
        if key in self._fields and not isinstance(value, kind):
            raise UserError(f"{self.path}: metadata key {key!r} must be of type {kind.__name__}")
        return value


def _map(path: Path, offset: int = 0, size: int = 0) -> mmap.mmap:
    """A private mapping of `size` bytes from `offset` on, or of the whole file."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=offset)
    except (OSError, ValueError) as error:  # an empty file cannot be mapped
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def _as_matrix(name: str, info: TensorInfo) -> TensorInfo:
    """llama.cpp's converter stores the gate of the shared experts, (1, C), as a vector."""
    if name.endswith(".ffn_gate_inp_shexp.weight") and len(info.shape) == 1:
        return replace(info, shape=(1, *info.shape))
    return info


def _meant(value: float) -> float:
    """The shortest decimal of a float32: 1e-6 is meant, not its nearest float32."""
    return float(str(np.float32(value)))
