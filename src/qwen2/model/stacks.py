"""Stacked expert weights in memory, and the three ways in which files hold them.

    in memory, transformers 5   experts.gate_up_proj (E, 2I, C)      experts.down_proj (E, C, I)
    published checkpoints       experts.{i}.gate_proj.weight, .up_proj.weight (I, C),
                                experts.{i}.down_proj.weight (C, I)
    GGUF, under our names       experts.gate_proj, experts.up_proj (E, I, C), experts.down_proj

Saving writes the published names, one matrix (out, in) each: what quantisers work on. Reading takes
any of the three. Rows, here, are of the last dimension: those of a stack are E·2I or E·C.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from math import prod

import torch
from torch import Tensor

from qwen2.model.stored import StoredTensor

_STACK = re.compile(r"(model\.layers\.\d+\.mlp\.experts)\.(gate_up_proj|down_proj)")


@dataclass(frozen=True)
class Piece:
    """Some consecutive rows of a stored tensor, which is expected to have `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    rows: int


class Layout(Enum):
    """How a file holds experts."""

    SINGLE = "each matrix of each expert, as published"
    STACKED = "as in memory"
    APART = "stacked, gate and up apart"


def layout_of(names: Collection[str]) -> Layout:
    """The layout of a file of tensors `names`; what has no stacks is taken for a published one."""
    if any(name.endswith(".mlp.experts.gate_up_proj") for name in names):
        return Layout.STACKED
    if any(name.endswith(".mlp.experts.gate_proj") for name in names):
        return Layout.APART
    return Layout.SINGLE


def pieces_of(name: str, shape: tuple[int, ...], layout: Layout) -> list[Piece]:
    """What the rows of parameter `name` are made of, in order."""
    stack = _STACK.fullmatch(name)
    gated = stack is not None and stack[2] == "gate_up_proj"
    if stack is None or layout is Layout.STACKED or (layout is Layout.APART and not gated):
        return [Piece(name, shape, 0, prod(shape[:-1]))]
    experts, height, width = shape
    parts = ("gate_proj", "up_proj") if gated else ("down_proj",)
    rows = height // len(parts)
    if layout is Layout.APART:
        return [
            Piece(f"{stack[1]}.{part}", (experts, rows, width), expert * rows, rows)
            for expert in range(experts)
            for part in parts
        ]
    return [
        Piece(f"{stack[1]}.{expert}.{part}.weight", (rows, width), 0, rows)
        for expert in range(experts)
        for part in parts
    ]


def published(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors under which a parameter is saved; those of a stack are views of it."""
    pieces = pieces_of(name, tuple(tensor.shape), Layout.SINGLE)
    if pieces[0].name == name:
        yield name, tensor
    else:
        rows = tensor.flatten(0, -2).split([piece.rows for piece in pieces])
        yield from zip((piece.name for piece in pieces), rows, strict=True)


@dataclass(frozen=True)
class Joined:
    """A stored tensor made of pieces of others."""

    shape: tuple[int, ...]
    pieces: list[Piece]
    stored: Mapping[str, StoredTensor]
    dtype: torch.dtype | None = None  # cannot be mapped, whatever type its pieces have

    def mapped(self) -> Tensor:
        raise AssertionError("pieces lie apart")

    def read_rows(self, start: int, out: Tensor) -> None:
        """Fill `out` with the rows from `start` on, piece by piece."""
        per_piece = self.pieces[0].rows  # all pieces of a stack have as many
        end = start + len(out)
        row = start
        while row < end:
            number, skip = divmod(row, per_piece)
            piece = self.pieces[number]
            count = min(end - row, per_piece - skip)
            part = out[row - start : row - start + count]
            self.stored[piece.name].read_rows(piece.start + skip, part)
            row += count
