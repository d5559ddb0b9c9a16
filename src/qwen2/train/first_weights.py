"""The weights that a run begins with: drawn at random, or those of a checkpoint.

In one process the model is made as it is elsewhere. Divided among ranks it is laid out on the meta
device first and divided there (parallelise.py); then each rank reads, or draws and keeps, its own
parts alone, so that no host ever holds a whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import Parameter

from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, draw, init_weights
from qwen2.model.extend import with_config
from qwen2.model.hub import open_checkpoint
from qwen2.model.stored import StoredTensor
from qwen2.model.weights import checked, on_meta

BLOCK = 1 << 24
"""Elements of a stored tensor that are read at a time, where a rank keeps some columns alone."""


class FirstWeights(Protocol):
    """Where weights come from."""

    @property
    def config(self) -> ModelConfig:
        """Of the model that is trained."""

    def model(self, device: torch.device) -> Qwen2:
        """The whole model in fp32."""

    def fill(self, parameters: Mapping[str, Parameter]) -> None:
        """Give `parameters`, this rank's in fp32, the values of that model; in place."""


@dataclass(frozen=True)
class RandomWeights:
    """Those of `init_weights`, the same however many ranks share them."""

    config: ModelConfig
    seed: int

    def model(self, device: torch.device) -> Qwen2:
        """The whole model in fp32."""
        model = Qwen2(self.config)
        init_weights(model, torch.Generator().manual_seed(self.seed))
        return model.to(device)

    @torch.no_grad()
    def fill(self, parameters: Mapping[str, Parameter]) -> None:
        """Every rank draws all, one tensor at a time, and keeps its part."""
        generator = torch.Generator().manual_seed(self.seed)
        for name, of_all in on_meta(self.config).named_parameters():
            whole = torch.empty(of_all.shape)
            draw(name, whole, self.config.initializer_range, generator)
            if name in parameters:
                here, own = own_part(parameters[name])
                here.copy_(whole[own])


@dataclass(frozen=True)
class StoredWeights:
    """Those of MODEL `name`, under its own configuration with `changes`."""

    name: str | Path
    changes: tuple[tuple[str, Any], ...] = ()

    @property
    def config(self) -> ModelConfig:
        """Of the model that is trained."""
        return open_checkpoint(self.name).config.model_copy(update=dict(self.changes))

    def model(self, device: torch.device) -> Qwen2:
        """The whole model in fp32: a checkpoint in bf16 is exact in it."""
        model = open_checkpoint(self.name).model("fp32", str(device))
        return with_config(model, **dict(self.changes)) if self.changes else model

    @torch.no_grad()
    def fill(self, parameters: Mapping[str, Parameter]) -> None:
        """Read this rank's parts."""
        checkpoint = open_checkpoint(self.name)
        _, stored = checked(checkpoint.config, checkpoint.tensors, checkpoint.path)
        for name, parameter in parameters.items():
            here, own = own_part(parameter)
            for out, block in _blocks(here, own, stored[name]):
                out.copy_(block)


def own_part(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """What this rank has of a parameter, and where that lies in the whole."""
    if not isinstance(parameter, DTensor):
        return parameter, tuple(slice(0, size) for size in parameter.shape)
    sizes, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    own = tuple(slice(o, o + size) for o, size in zip(offsets, sizes, strict=True))
    return parameter.to_local(), own


def _blocks(
    here: Tensor, own: tuple[slice, ...], stored: StoredTensor
) -> Iterator[tuple[Tensor, Tensor]]:
    """Parts of `here`, which is `own` of what is stored, and their values."""
    if not here.numel():
        return
    if here.ndim == 1:
        row = torch.empty(stored.shape)
        stored.read_rows(0, row)
        yield here, row[own]
        return
    *_, height, width = stored.shape
    # Matrices of a stack one by one; rows are counted through all of them.
    stack = here if here.ndim == 3 else here[None]
    first = own[0].start if here.ndim == 3 else 0
    rows, columns = own[-2], own[-1]
    step = max(1, BLOCK // width)
    for number, matrix in enumerate(stack):
        begin = (first + number) * height + rows.start
        for start in range(0, len(matrix), step):
            out = matrix[start : start + step]
            block = torch.empty(len(out), width)
            stored.read_rows(begin + start, block)
            yield out, block[:, columns]
