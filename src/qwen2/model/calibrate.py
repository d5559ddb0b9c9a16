"""Quantising with an eye on text: what the inputs of every layer look like decides its rounding.

The model is read and run one decoder layer at a time, so that no more than one layer stands beside
the quantised result: all calibration windows pass through a layer, the products of its inputs are
summed, its weights are rounded (rounding.py), and the windows pass through it once more, as it now
is, into the next. Later layers so make good what earlier ones lost (as in GPTQ's code).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2.model.attention import PackedAttention, scheme_of
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Layer
from qwen2.model.moe import Experts
from qwen2.model.packing import Parts
from qwen2.model.quantised_linear import INT4, Format
from qwen2.model.rope import Rope, Rotary
from qwen2.model.rounding import compensate_int4, inverse_factor
from qwen2.model.stored import StoredTensor
from qwen2.model.weights import read
from qwen2.tokenizer import Tokenizer

if TYPE_CHECKING:
    from qwen2.corpus.documents import Document

Calibration = Sequence[Sequence[int]]
"""Windows of token ids, each a text by itself."""

WINDOW, WINDOWS = 512, 60
"""Tokens of a window, and how many; twice as many were no better, half as many were worse."""

_BATCH = 4  # windows that pass through a layer together

KINDS = ("code", "docstrings", "reference", "prose", "multilingual")


def calibration_documents(windows: int = WINDOWS) -> list[Document]:
    """Text of this machine (see corpus/machine.py), as many documents of each kind."""
    # Only here: Arrow's libraries alone are 40 MB, which who quantises without text need not hold.
    from qwen2.corpus.machine import local_documents

    share = -(-windows // len(KINDS))
    documents: list[Document] = []
    for kind in KINDS:
        found = local_documents(kind)
        long_enough = (document for document in found if document.size > 8 * WINDOW)
        documents += [document for document, _ in zip(long_enough, range(share), strict=False)]
    return documents


def calibration_windows(tokenizer: Tokenizer, windows: int = WINDOWS) -> list[list[int]]:
    """The beginnings of the calibration documents as token ids."""
    texts = [document.text for document in calibration_documents(windows)]
    ids = tokenizer.encode_batch(text[: 8 * WINDOW] for text in texts)
    return [[tokenizer.end_of_text_id, *each][:WINDOW] for each in ids]


def calibrated_layers(
    config: ModelConfig,
    sources: Mapping[str, StoredTensor],
    formats: Mapping[str, Format],
    embedding: Callable[[Tensor], Tensor],
    windows: Calibration,
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[tuple[str, Parts]]:
    """Names and parts of the layers' weights, rounded by what `windows` make of their inputs.

    `embedding` gives the rows of tokens (N,); layers run in `dtype` on `device`.
    """
    batches = _batches(config, embedding, windows, dtype, device)
    with _fast_products():
        for index in range(config.num_hidden_layers):
            prefix = f"model.layers.{index}."
            layer = _read_layer(config, index, sources, dtype, device)
            inputs = _Inputs(layer)
            for batch in batches:
                batch.through(layer)
            inputs.close()
            for name, format_ in formats.items():
                if not name.startswith(prefix):
                    continue
                parts = _rounded(layer, inputs, name.removeprefix(prefix), format_)
                rounded = format_.dequantise(*parts)
                layer.get_parameter(name.removeprefix(prefix)).copy_(rounded)
                yield name, parts
            for batch in batches:
                batch.hidden = batch.through(layer)


@dataclass
class _Batch:
    """Some windows between two layers."""

    hidden: Tensor  # (N, C)
    attention: PackedAttention
    rotary: Rotary

    def through(self, layer: Layer) -> Tensor:
        """What `layer` makes of them (N, C)."""
        out: Tensor = layer(self.hidden, self.rotary, self.attention)
        return out


def _batches(
    config: ModelConfig,
    embedding: Callable[[Tensor], Tensor],
    windows: Calibration,
    dtype: torch.dtype,
    device: torch.device,
) -> list[_Batch]:
    rope, scheme = Rope(config.head_dim, config.rope_theta, config.yarn), scheme_of(config)
    batches = []
    for begin in range(0, len(windows), _BATCH):
        some = [torch.tensor(ids, device=device) for ids in windows[begin : begin + _BATCH]]
        positions = torch.cat([torch.arange(len(ids), device=device) for ids in some])
        attention = PackedAttention([len(ids) for ids in some], scheme)
        rotary = attention.rotary(rope, positions, dtype)
        batches.append(_Batch(embedding(torch.cat(some)).to(dtype), attention, rotary))
    return batches


def _read_layer(
    config: ModelConfig,
    index: int,
    sources: Mapping[str, StoredTensor],
    dtype: torch.dtype,
    device: torch.device,
) -> Layer:
    with torch.device("meta"):
        layer = Layer(config, index)
    prefix = f"model.layers.{index}."
    state = {name: read(sources[prefix + name], dtype).to(device) for name in layer.state_dict()}
    layer.load_state_dict(state, assign=True)
    return layer


class _Inputs:
    """What a layer's weights are multiplied with, while it runs: sums of products x xᵀ.

    Routed experts have inputs of their own, so those are kept as they are.
    """

    def __init__(self, layer: Layer) -> None:
        self.products: dict[str, Tensor] = {}  # (K, K) in fp32, by the module's path
        self.factors: dict[str, Tensor] = {}
        self.routed: list[tuple[Tensor, Tensor]] = []  # tokens (N, C), their experts' ids (N, k)
        self._handles = [
            module.register_forward_pre_hook(partial(self._add, path))
            for path, module in layer.named_modules()
            if path.rpartition(".")[2] in _FIRST_OF or isinstance(module, Experts)
        ]

    def close(self) -> None:
        """Look no longer."""
        for handle in self._handles:
            handle.remove()

    def _add(self, path: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].float()
        if path not in self.products:
            self.products[path] = x.new_zeros(x.shape[1], x.shape[1])
        self.products[path].addmm_(x.t(), x)
        if isinstance(module, Experts):
            self.routed.append((arguments[0], arguments[1]))

    def factor(self, path: str) -> Tensor:
        """What `compensate_int4` wants of the inputs of the module at `path`."""
        if path in self.products:
            self.factors[path] = inverse_factor(self.products.pop(path))
        return self.factors[path]

    def of_expert(self, experts: Experts, expert: int) -> Tensor:
        """The same, of the input of an expert's down projection."""
        rows = torch.cat([x[(ids == expert).any(1)] for x, ids in self.routed])
        gate, up = F.linear(rows, experts.gate_up_proj[expert]).chunk(2, dim=-1)
        inner = (F.silu(gate) * up).float()
        return inverse_factor(inner.t() @ inner)


_FIRST_OF = {
    "q_proj": ("q_proj", "k_proj", "v_proj"),
    "o_proj": ("o_proj",),
    "gate_proj": ("gate_proj", "up_proj"),
    "down_proj": ("down_proj",),
}
"""Linear layers, and which have their input."""


def _rounded(layer: Layer, inputs: _Inputs, path: str, format_: Format) -> Parts:
    """The parts of the layer's parameter at `path`."""
    weight = layer.get_parameter(path)
    if format_ is not INT4:
        return format_.quantise(weight)
    owner, _, leaf = path.rpartition(".")
    if leaf != "weight":  # a stack
        experts = layer.get_submodule(owner)
        assert isinstance(experts, Experts)
        each = [
            compensate_int4(
                matrix,
                inputs.factor(owner)
                if leaf == "gate_up_proj"
                else inputs.of_expert(experts, expert),
            )
            for expert, matrix in enumerate(weight)
        ]
        return tuple(torch.stack(part) for part in zip(*each, strict=True))
    outer, _, own = owner.rpartition(".")
    first = next(first for first, same in _FIRST_OF.items() if own in same)
    return compensate_int4(weight, inputs.factor(f"{outer}.{first}"))


@contextmanager
def _fast_products() -> Iterator[None]:
    """Products of fp32 at half the time on the CPU, and nearly as exact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
