"""Upcycling: a mixture of experts initialised from a dense model (report section 2.2.2).

The report's procedure, in every layer: copy the dense FFN ceil(n·h_E / h_FFN) times, shuffle each
copy along its intermediate dimension, cut n experts of width h_E off in order (they straddle
copies), discard the rest, and initialise half of each expert's parameters anew at random.

A unit u of the intermediate dimension is a gate row, an up row and a down column, and the FFN is a
sum over its units, FFN(x) = Σ_u down[:, u] · silu(gate_u·x) · (up_u·x), in any order. Therefore,
where nothing is initialised anew, Σ_e E_e(x) + D(x) = copies · FFN(x), with D the sum over the
discarded units; and where h_FFN divides n·h_E and every expert counts h_FFN / (n·h_E), the routed
experts are the dense FFN.

What the report leaves open are options of `UpcycleConfig`. Everything is a function of the dense
weights, the options, the layer and the expert: each tensor can be made by itself, in any order, and
only the dense FFN of one layer is in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.common.progress import Progress
from qwen2.model.config import PUBLISHED, Mixture, ModelConfig
from qwen2.model.hf_folder import MAX_SHARD_BYTES, write_folder
from qwen2.model.hub import Checkpoint, open_checkpoint
from qwen2.model.weights import checked, read

Units = npt.NDArray[np.int64]

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

NOTES = "upcycle.json"
"""What a mixture was made from and how, in its folder."""

_SMALL_SHARD = 1 << 26  # a layer smaller than this shares its file with others


class UpcycleConfig(Config):
    """The mixture wanted, and what the report does not say about its initialisation."""

    experts: int = Field(default=64, gt=0)  # n
    experts_per_token: int = Field(default=8, gt=0)  # k
    expert_size: int | None = Field(default=None, gt=0)
    """h_E; None: 2560/18944 of h_FFN as in Table 1, to a multiple of 16, at least 16."""
    shared_size: int | None = Field(default=None, gt=0)
    """h_S, width of all shared experts together; None: k·h_E, as in Table 1."""
    init: Literal["report", "copy"] = "report"
    """copy: experts are plain cuts, neither shuffled nor initialised anew; the baseline."""
    reinit: float = Field(default=0.5, ge=0, le=1)  # share of each expert that starts at random
    granularity: Literal["unit", "parameter"] = "unit"
    """unit: round(reinit·h_E) whole units; parameter: that share of each matrix's entries."""
    std: Literal["matched", "initializer_range"] = "matched"
    """Of new numbers; matched: that of the layer's dense gate, up or down matrix, each its own."""
    router_std: float | None = Field(default=None, ge=0)  # None: initializer_range
    shared: Literal["preserve", "copy", "random"] = "preserve"
    """Of the shared experts, whose gate starts at sigmoid(0) = 1/2.

    copy: units of the dense FFN, the first copy in order and further ones shuffled and cut.
    preserve: the same, each down column times 2 / (times that its unit occurs), so that the shared
    path is exactly the dense FFN; if h_S < h_FFN, of the units that are there. random:
    Normal(0, initializer_range).
    """
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _enough_experts(self) -> Self:
        if self.experts_per_token > self.experts:
            raise ValueError(
                f"experts_per_token {self.experts_per_token} exceeds experts {self.experts}"
            )
        return self

    def mixture(self, dense: ModelConfig) -> Mixture:
        """The sizes of the mixture made from `dense`."""
        size = self.expert_size or default_expert_size(dense.intermediate_size)
        return Mixture(
            num_experts=self.experts,
            num_experts_per_tok=self.experts_per_token,
            moe_intermediate_size=size,
            shared_expert_intermediate_size=self.shared_size or self.experts_per_token * size,
        )


def default_expert_size(dense_size: int) -> int:
    """Table 1's share of the dense width, 2560 of 18944, to a multiple of 16."""
    moe = PUBLISHED["57b-a14b"].moe
    assert moe is not None
    share = moe.moe_intermediate_size / PUBLISHED["7b"].intermediate_size
    return max(16, 16 * round(dense_size * share / 16))


def count_copies(moe: Mixture, dense_size: int) -> tuple[int, int]:
    """Copies of the dense FFN that the experts are cut from; units that are left over."""
    total = moe.num_experts * moe.moe_intermediate_size
    copies = -(-total // dense_size)
    return copies, copies * dense_size - total


def units_at(start: int, stop: int, dense_size: int, order: Callable[[int], Units]) -> Units:
    """Dense units at [start, stop) of the copies laid end to end; `order(c)` is copy c's units."""
    pieces: list[Units] = [np.empty(0, np.int64)]
    for copy in range(start // dense_size, -(-stop // dense_size)):
        first = copy * dense_size
        pieces.append(order(copy)[max(0, start - first) : stop - first])
    return np.concatenate(pieces)


class _Purpose(IntEnum):
    """What random numbers are for: each has streams of its own."""

    SHUFFLE, CHOICE, NOISE, ROUTER, SHARED_SHUFFLE, SHARED_NOISE = range(6)


def _random(seed: int, layer: int, purpose: _Purpose, *key: int) -> np.random.Generator:
    """A stream of its own for each argument: numpy's, for torch's seeds have but 32 bits."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(layer, purpose, *key)))


def routed_order(config: UpcycleConfig, layer: int, dense_size: int) -> Callable[[int], Units]:
    """The order of units in each copy that routed experts are cut from."""
    if config.init == "copy":
        return lambda copy: np.arange(dense_size)
    return lambda copy: _random(config.seed, layer, _Purpose.SHUFFLE, copy).permutation(dense_size)


def shared_order(config: UpcycleConfig, layer: int, dense_size: int) -> Callable[[int], Units]:
    """The order of units in each copy that shared experts are cut from: the first as it is."""

    def order(copy: int) -> Units:
        if copy == 0:
            return np.arange(dense_size)
        return _random(config.seed, layer, _Purpose.SHARED_SHUFFLE, copy).permutation(dense_size)

    return order


def replaced(
    config: UpcycleConfig, layer: int, expert: int, moe: Mixture, projection: int, entries: int
) -> Units:
    """What starts at random: units (granularity unit), or entries of the flat matrix."""
    if config.granularity == "unit":
        random = _random(config.seed, layer, _Purpose.CHOICE, expert)  # all three matrices alike
        size = moe.moe_intermediate_size
    else:
        random = _random(config.seed, layer, _Purpose.CHOICE, expert, projection)
        size = entries
    return random.choice(size, round(config.reinit * size), replace=False, shuffle=False)


@dataclass(frozen=True)
class _DenseMatrix:
    """A gate, up or down matrix of the dense FFN."""

    weight: Tensor
    unit_dim: int  # along which its units lie
    std: float  # of the numbers that replace its own


class UpcycledTensors(Mapping[str, Tensor]):
    """Every tensor of the mixture by its published name, made when it is asked for, in `dtype`.

    What is no FFN passes through.

    Raises:
        UserError: a tensor of `dense` is missing, unknown or of a wrong shape.
    """

    def __init__(self, dense: Checkpoint, options: UpcycleConfig, dtype: torch.dtype) -> None:
        self.dense = dense.config
        self.options, self.dtype = options, dtype
        self.moe = options.mixture(self.dense)
        self.config = self.dense.model_copy(update={"moe": self.moe})
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._make: dict[str, Callable[[], Tensor]] = {}
        self._held: tuple[int, list[_DenseMatrix]] = (-1, [])
        # In the order of layers, whatever that of the file: each is read once.
        _, self.stored = checked(self.dense, dense.tensors, dense.path)
        for name, stored in self.stored.items():
            place, _, matrix = name.partition(".mlp.")
            if not matrix:
                self._add(name, stored.shape, partial(self._pass_through, name))
            elif matrix == "gate_proj.weight":
                self._add_layer(f"{place}.mlp", layer=layer_of(name))

    def __getitem__(self, name: str) -> Tensor:
        return self._make[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._make)

    def __len__(self) -> int:
        return len(self._make)

    def layer_bytes(self) -> int:
        """Bytes of a layer of the mixture."""
        elements = sum(
            torch.Size(shape).numel() for name, shape in self.shapes.items() if layer_of(name) == 0
        )
        return elements * self.dtype.itemsize

    def _add(self, name: str, shape: tuple[int, ...], make: Callable[[], Tensor]) -> None:
        self.shapes[name], self._make[name] = shape, make

    def _add_layer(self, place: str, layer: int) -> None:
        C, E = self.dense.hidden_size, self.moe.num_experts
        size, shared = self.moe.moe_intermediate_size, self.moe.shared_expert_intermediate_size
        self._add(f"{place}.gate.weight", (E, C), partial(self._router, layer))
        for i, name in enumerate(PROJECTIONS):
            shape = (C, shared) if name == "down_proj" else (shared, C)
            self._add(
                f"{place}.shared_expert.{name}.weight", shape, partial(self._shared, layer, i)
            )
        no_gate = partial(torch.zeros, 1, C, dtype=self.dtype)
        self._add(f"{place}.shared_expert_gate.weight", (1, C), no_gate)
        for e in range(E):
            for i, name in enumerate(PROJECTIONS):
                shape = (C, size) if name == "down_proj" else (size, C)
                make = partial(self._expert, layer, e, i)
                self._add(f"{place}.experts.{e}.{name}.weight", shape, make)

    def _pass_through(self, name: str) -> Tensor:
        return read(self.stored[name], self.dtype)

    def _router(self, layer: int) -> Tensor:
        """(E, C)"""
        std = self.options.router_std
        random = _random(self.options.seed, layer, _Purpose.ROUTER)
        shape = (self.moe.num_experts, self.dense.hidden_size)
        return self._normal(random, shape, self.dense.initializer_range if std is None else std)

    def _expert(self, layer: int, expert: int, projection: int) -> Tensor:
        """(h_E, C), or (C, h_E) for down."""
        dense, size = self._dense_ffn(layer)[projection], self.moe.moe_intermediate_size
        order = routed_order(self.options, layer, self.dense.intermediate_size)
        first = expert * size
        units = units_at(first, first + size, self.dense.intermediate_size, order)
        weight = dense.weight.index_select(dense.unit_dim, torch.from_numpy(units))
        if self.options.init == "copy":
            return weight
        new = torch.from_numpy(
            replaced(self.options, layer, expert, self.moe, projection, weight.numel())
        )
        random = _random(self.options.seed, layer, _Purpose.NOISE, expert, projection)
        if self.options.granularity == "parameter":
            weight.view(-1)[new] = self._normal(random, (len(new),), dense.std)
            return weight
        shape = list(weight.shape)
        shape[dense.unit_dim] = len(new)
        noise = self._normal(random, tuple(shape), dense.std)
        return weight.index_copy_(dense.unit_dim, new, noise)

    def _shared(self, layer: int, projection: int) -> Tensor:
        """(h_S, C), or (C, h_S) for down."""
        size, dense_size = self.moe.shared_expert_intermediate_size, self.dense.intermediate_size
        down = PROJECTIONS[projection] == "down_proj"
        if self.options.shared == "random":
            C = self.dense.hidden_size
            random = _random(self.options.seed, layer, _Purpose.SHARED_NOISE, projection)
            shape = (C, size) if down else (size, C)
            return self._normal(random, shape, self.dense.initializer_range)
        units = units_at(0, size, dense_size, shared_order(self.options, layer, dense_size))
        dense = self._dense_ffn(layer)[projection]
        weight = dense.weight.index_select(dense.unit_dim, torch.from_numpy(units))
        if down and self.options.shared == "preserve":
            times = np.bincount(units, minlength=dense_size)[units]
            weight *= torch.from_numpy(2 / times).to(self.dtype)
        return weight

    def _normal(self, random: np.random.Generator, shape: tuple[int, ...], std: float) -> Tensor:
        """Drawn in fp32 whatever the type asked for, so that all types get the same numbers."""
        numbers = torch.from_numpy(random.standard_normal(shape, dtype=np.float32))
        return numbers.mul_(std).to(self.dtype)

    def _dense_ffn(self, layer: int) -> list[_DenseMatrix]:
        """Gate, up and down of a layer; held until another layer is asked for."""
        if self._held[0] != layer:
            self._held = (-1, [])  # the old ones go before the new ones come
            names = [f"model.layers.{layer}.mlp.{name}.weight" for name in PROJECTIONS]
            self._held = (layer, [self._dense_matrix(name) for name in names])
        return self._held[1]

    def _dense_matrix(self, name: str) -> _DenseMatrix:
        weight = read(self.stored[name], self.dtype)
        std = self.dense.initializer_range
        if self.options.std == "matched":
            std = float(weight.float().std(correction=0))
        return _DenseMatrix(weight, 1 if "down_proj" in name else 0, std)


def layer_of(name: str) -> int:
    """The layer of a published name; -1 for what is outside of them."""
    return int(name.split(".")[2]) if name.startswith("model.layers.") else -1


def upcycle(
    source: str | Path, folder: Path, options: UpcycleConfig, *, dtype: str = "auto"
) -> ModelConfig:
    """Write a mixture made from the dense model `source` as `folder`, or nothing.

    `dtype` `auto` keeps the source's, and is bf16 for GGUF. Memory holds the dense FFN of one layer
    and a file of the output, which is about a layer of it.

    Returns:
        The configuration of the mixture.

    Raises:
        UserError: `source` is broken or a mixture already, `folder` exists, or the disk is full.
    """
    if folder.exists():
        raise UserError(f"{folder}: exists already; choose another place or remove it")
    dense = open_checkpoint(source)
    if dense.config.moe:
        raise UserError(
            f"{source}: has {dense.config.moe.num_experts} experts already; give a dense model"
        )
    if dense.config.quantisation:
        raise UserError(f"{source}: its weights are quantised; give the original")
    tensors = UpcycledTensors(dense, options, dense.choose_dtype(dtype))
    layers = dense.config.num_hidden_layers
    with Progress("upcycle", layers) as progress:

        def make(name: str) -> Tensor:
            if (layer := layer_of(name)) > 0:
                progress.update(layer)
            return tensors[name]

        write_folder(
            folder,
            tensors.config,
            dense.tokenizer(),
            tensors.shapes,
            make,
            tensors.dtype,
            max_shard_bytes=min(MAX_SHARD_BYTES, max(_SMALL_SHARD, tensors.layer_bytes())),
            notes={NOTES: _notes(source, options, tensors)},
        )
        progress.update(layers)
    return tensors.config


def _notes(source: str | Path, options: UpcycleConfig, tensors: UpcycledTensors) -> dict[str, Any]:
    moe, std = tensors.moe, options.router_std
    return {
        "dense": str(source),
        **options.model_dump(),
        "expert_size": moe.moe_intermediate_size,
        "shared_size": moe.shared_expert_intermediate_size,
        "router_std": tensors.dense.initializer_range if std is None else std,
    }
