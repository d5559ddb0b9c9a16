"""Linear layers and an embedding whose weights are stored in 8 or 4 bits, for inference.

    int8   w = q · scale, q in -127..127, a scale for each output channel (row)
    int4   w = q · scale + minimum, q in 0..15, both for each group of 32 neighbours of a row

In both, activations are quantised when they come, symmetrically for each token (row of x):
q = round(x · 127 / max|x|), halves to even. The int8 product is then one of integers, which is
exact: its results depend neither on the batch nor on the order of the sums.

Files and modules hold the same tensors, so that a saved model is mapped as it is. For a weight
(N, K), N rows of K, a layer `X` has

    int8   X.weight int8 (N, K)          X.weight_scale fp32 (N,)
    int4   X.weight uint8 (N, K / 2)     X.weight_scale, X.weight_min fp16 (N, K / 32)

Each 64 numbers of an int4 row are 32 bytes: the low nibbles are numbers 0 to 31, the high ones 32
to 63, so that a vector register holds a group in order. Stacks of experts have E in front.

`int8_linear` and `int4_linear` are the plain reference; kernels.py has the faster ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2.model import kernels
from qwen2.model.config import Quantisation
from qwen2.model.linear import Linear
from qwen2.model.packing import (
    CHUNK,
    GROUP,
    Parts,
    dequantise_int4,
    dequantise_int8,
    quantise_rows,
)
from qwen2.model.rounding import search_int4


def int8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (M, K) times weight int8 (N, K), scale (N,) -> (M, N) in x's type.

    Sums are exact, then come scale of the token, scale of the channel and bias, in fp32.
    """
    return _int8_linear(x, weight, scale, bias, _integer_product)


def int8_linear_by_fp32(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`int8_linear`, to the bit, by products in fp32."""
    return _int8_linear(x, weight, scale, bias, _integer_product_by_fp32)


def _int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    product: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    rows, row_scale = quantise_rows(x)
    y = product(rows, weight).float()
    y.mul_(row_scale[:, None]).mul_(scale)
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype)


def int4_linear(
    x: Tensor, weight: Tensor, scale: Tensor, minimum: Tensor, bias: Tensor | None
) -> Tensor:
    """x (M, K) times weight uint8 (N, K / 2), scale and minimum (N, K / 32) -> (M, N).

    Dequantised in fp32, so that nothing is rounded but the activations: a kernel may sum the
    integers of each group and scale the sums.
    """
    rows, row_scale = quantise_rows(x)
    y = rows.float() @ dequantise_int4(weight, scale, minimum).t()
    y.mul_(row_scale[:, None])
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype)


@dataclass(frozen=True)
class Format:
    """How a weight (..., N, K) is stored; see the module."""

    name: str
    suffixes: tuple[str, ...]  # of the names of its parts
    empty: Callable[[tuple[int, ...]], Parts]  # of a shape (..., N, K)
    quantise: Callable[[Tensor], Parts]  # without regard to the input
    dequantise: Callable[..., Tensor]  # the parts
    linear: Callable[..., Tensor]  # (x, *parts, bias)


def _empty_int8(shape: tuple[int, ...]) -> Parts:
    return torch.empty(shape, dtype=torch.int8), torch.empty(shape[:-1], dtype=torch.float32)


def _empty_int4(shape: tuple[int, ...]) -> Parts:
    *outer, width = shape
    packed = torch.empty(*outer, width // 2, dtype=torch.uint8)
    scale, minimum = torch.empty(2, *outer, width // GROUP, dtype=torch.float16)
    return packed, scale, minimum


def _product(operation: str) -> Callable[..., Tensor]:
    """A product by the table of kernels."""

    def product(x: Tensor, *parts: Tensor | None) -> Tensor:
        return kernels.TABLE[operation](x, *parts)

    return product


INT8 = Format(
    "int8",
    ("", "_scale"),
    _empty_int8,
    quantise_rows,
    dequantise_int8,
    _product("int8 rows"),
)
INT4 = Format(
    "int4",
    ("", "_scale", "_min"),
    _empty_int4,
    search_int4,
    dequantise_int4,
    _product("int4 rows"),
)


def format_of(quantisation: Quantisation, in_features: int) -> Format:
    """The format of a weight with rows of `in_features`; int8 where chunks do not fill them."""
    return INT4 if quantisation.method == "int4" and in_features % CHUNK == 0 else INT8


class Quantised(nn.Module):
    """A module that holds weights in a format; `formats` says which, by the parameter's name."""

    formats: dict[str, Format]

    def hold(self, name: str, shape: tuple[int, ...], format_: Format) -> None:
        """Register the parts of a weight, not yet filled."""
        self.formats = {**getattr(self, "formats", {}), name: format_}
        for suffix, part in zip(format_.suffixes, format_.empty(shape), strict=True):
            self.register_parameter(name + suffix, nn.Parameter(part, requires_grad=False))

    def parts_of(self, name: str) -> Parts:
        """The parts of the weight `name`."""
        return tuple(getattr(self, name + suffix) for suffix in self.formats[name].suffixes)


class QuantisedLinear(Quantised):
    """A linear layer in a format; its bias, where it has one, is an ordinary parameter."""

    weight: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool, format_: Format) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.hold("weight", (out_features, in_features), format_)
        self.product = format_.linear
        self.bias: nn.Parameter | None
        self.register_parameter("bias", nn.Parameter(torch.empty(out_features)) if bias else None)

    def parts(self) -> dict[str, Tensor | None]:
        """What the product takes beside its input; each has a row for each output."""
        names = ["weight" + suffix for suffix in self.formats["weight"].suffixes]
        return {**dict(zip(names, self.parts_of("weight"), strict=True)), "bias": self.bias}

    def forward(self, x: Tensor) -> Tensor:
        """x (N, in) -> (N, out)."""
        return self.product(x, *self.parts_of("weight"), self.bias)


def linear_layer(
    in_features: int, out_features: int, bias: bool, quantisation: Quantisation | None
) -> Linear | QuantisedLinear:
    """A linear layer as the configuration has it."""
    if quantisation is None:
        return Linear(in_features, out_features, bias)
    return QuantisedLinear(in_features, out_features, bias, format_of(quantisation, in_features))


class QuantisedEmbedding(Quantised):
    """An embedding in int8, whose rows are dequantised as they are looked up."""

    weight: Tensor
    weight_scale: Tensor

    def __init__(self, count: int, size: int) -> None:
        super().__init__()
        self.hold("weight", (count, size), INT8)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (N,) -> (N, size), in fp32."""
        return dequantise_int8(F.embedding(tokens, self.weight), self.weight_scale[tokens])


class QuantisedExperts(Quantised):
    """The weights of all routed experts, stacked and in a format: `moe.Experts` for inference."""

    def __init__(
        self, experts: int, hidden_size: int, intermediate_size: int, quantisation: Quantisation
    ) -> None:
        super().__init__()
        E, I, C = experts, intermediate_size, hidden_size  # noqa: E741
        self.hold("gate_up_proj", (E, 2 * I, C), format_of(quantisation, C))
        self.hold("down_proj", (E, C, I), format_of(quantisation, I))

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x (N, C), its experts' ids and weights (N, k) -> (N, C); see `experts.loop_experts`.

        Only experts that a token is sent to are touched.
        """
        y = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            token, place = torch.where(ids == expert)
            gate, up = self._product("gate_up_proj", expert, x[token]).chunk(2, dim=-1)
            out = self._product("down_proj", expert, F.silu(gate) * up)
            y.index_add_(0, token, out * weights[token, place, None])
        return y

    def _product(self, name: str, expert: int, x: Tensor) -> Tensor:
        parts = (part[expert] for part in self.parts_of(name))
        return self.formats[name].linear(x, *parts, None)


def quantised_weights(model: nn.Module) -> dict[str, Format]:
    """Names of the weights of `model` that are in a format, and in which."""
    return {
        f"{path}.{name}": format_
        for path, module in model.named_modules()
        if isinstance(module, Quantised)
        for name, format_ in module.formats.items()
    }


def named_parts(name: str, format_: Format, parts: Parts) -> dict[str, Tensor]:
    """The parts of the weight `name` by their own names."""
    return {name + suffix: part for suffix, part in zip(format_.suffixes, parts, strict=True)}


def quantised_types(model: nn.Module) -> dict[str, torch.dtype]:
    """Names of the parts of all weights of `model` in a format, and their number types."""
    tensors = model.state_dict()
    names = [n + suffix for n, form in quantised_weights(model).items() for suffix in form.suffixes]
    return {name: tensors[name].dtype for name in names}


def _integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x int8 (M, K), weight int8 (N, K) -> exact sums (M, N), int32."""
    if x.device.type == "cpu":
        return torch._int_mm(x, weight.t())
    # CUDA's wants more than 16 rows, and K and N in multiples of 8: zeros add nothing.
    (M, K), N = x.shape, len(weight)
    rows, inner, columns = max(32 - M, 0), -K % 8, -N % 8
    padded = F.pad(weight, (0, inner, 0, columns)) if inner or columns else weight
    return torch._int_mm(F.pad(x, (0, inner, 0, rows)), padded.t())[:M, :N]


EXACT = 1024  # terms of at most 127² whose sum fp32 has exactly: less than 2^24


def _integer_product_by_fp32(x: Tensor, weight: Tensor) -> Tensor:
    """x int8 (M, K), weight int8 (N, K) -> exact sums (M, N), int32."""
    sums = torch.zeros((len(x), len(weight)), dtype=torch.int32, device=x.device)
    for first in range(0, x.shape[1], EXACT):
        part = slice(first, first + EXACT)
        sums += (x[:, part].float() @ weight[:, part].float().t()).to(torch.int32)
    return sums
