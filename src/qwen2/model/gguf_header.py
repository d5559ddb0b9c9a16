"""The header of a GGUF file: metadata and where each tensor lies, checked against the file's size.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3. The `gguf`
package's reader takes seconds for a vocabulary of 150,000 tokens and trusts the counts it reads;
this one takes a tenth of a second and believes nothing.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from qwen2.common.errors import UserError

_MAGIC = b"GGUF"
_MAX_DIMENSIONS = 4
_STRING, _ARRAY = 8, 9
# Format characters of the scalar types, by the number that stands for each in a file.
_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and how it is written."""

    shape: tuple[int, ...]  # slowest dimension first, as in torch
    type: GGMLQuantizationType
    offset: int  # bytes from the start of the file
    row_bytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data."""

    fields: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path, data: mmap.mmap) -> Header:
    """Read and check the header of the file mapped as `data`.

    Raises:
        UserError: not GGUF, cut short, or a count, type or offset that cannot be.
    """
    cursor = _Cursor(path, data)
    if cursor.take(4) != _MAGIC:
        raise UserError(f"{path}: not a GGUF file")
    version = cursor.scalar("I")
    if version not in (2, 3):
        raise UserError(f"{path}: GGUF version {version}; versions 2 and 3 are known")
    tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
    cursor.require(tensor_count, 24)
    cursor.require(field_count, 13)
    fields: dict[str, Any] = {}
    for _ in range(field_count):
        key = cursor.string()
        if key in fields:
            raise UserError(f"{path}: metadata key {key!r} stands twice")
        fields[key] = cursor.value(cursor.scalar("I"))
    return Header(fields, _tensors(cursor, tensor_count, fields.get("general.alignment", 32)))


class _Cursor:
    """A place in the file; whatever would read beyond the end is an error."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.offset, self.size = path, data, 0, len(data)

    def require(self, count: int, size: int) -> None:
        """`count` things of at least `size` bytes each must fit into what is left."""
        if count * size > self.size - self.offset:
            raise UserError(
                f"{self.path}: cut short or damaged: {count} entries announced at byte "
                f"{self.offset} do not fit into the file; fetch it again"
            )

    def take(self, size: int) -> bytes:
        self.require(size, 1)
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def scalar(self, kind: str) -> Any:
        return self.scalars(kind, 1)[0]

    def scalars(self, kind: str, count: int) -> tuple[Any, ...]:
        self.require(count, struct.calcsize(kind))
        return struct.unpack(f"<{count}{kind}", self.take(count * struct.calcsize(kind)))

    def string(self) -> str:
        return self.strings(1)[0]

    def strings(self, count: int) -> list[str]:
        self.require(count, 8)
        length_at = struct.Struct("<Q").unpack_from
        strings, data, offset = [], self.data, self.offset
        try:
            for _ in range(count):
                end = offset + 8 + length_at(data, offset)[0]
                if end > self.size:
                    self.require(end, 1)
                strings.append(str(data[offset + 8 : end], "utf-8"))
                offset = end
        except (UnicodeDecodeError, struct.error):
            raise UserError(f"{self.path}: no readable string at byte {offset}") from None
        self.offset = offset
        return strings

    def value(self, kind: int) -> Any:
        if kind == _ARRAY:
            kind, count = self.scalar("I"), self.scalar("Q")
            if kind == _STRING:
                return self.strings(count)
            return list(self.scalars(self._scalar_kind(kind), count))
        if kind == _STRING:
            return self.string()
        return self.scalar(self._scalar_kind(kind))

    def _scalar_kind(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise UserError(f"{self.path}: unknown metadata type {kind} at byte {self.offset}")
        return _SCALARS[kind]


def _tensors(cursor: _Cursor, count: int, alignment: Any) -> dict[str, TensorInfo]:
    path = cursor.path
    if not isinstance(alignment, int) or alignment <= 0 or alignment % 8:
        raise UserError(f"{path}: general.alignment {alignment!r}, expected a multiple of 8")
    tensors: dict[str, TensorInfo] = {}
    for _ in range(count):
        name, dimensions = cursor.string(), cursor.scalar("I")
        if name in tensors:
            raise UserError(f"{path}: tensor {name!r} stands twice")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise UserError(f"{path}: tensor {name!r} has {dimensions} dimensions")
        shape = cursor.scalars("Q", dimensions)[::-1]
        kind, offset = cursor.scalar("I"), cursor.scalar("Q")
        try:
            type_ = GGMLQuantizationType(kind)
        except ValueError:
            raise UserError(f"{path}: tensor {name!r} has the unknown type {kind}") from None
        block, size = GGML_QUANT_SIZES[type_]
        if shape[-1] % block:
            raise UserError(
                f"{path}: rows of tensor {name!r} have {shape[-1]} elements, "
                f"not a multiple of the {block} of type {type_.name}"
            )
        if offset % alignment:
            raise UserError(f"{path}: tensor {name!r} does not start at a multiple of {alignment}")
        tensors[name] = TensorInfo(shape, type_, offset, shape[-1] // block * size)
    start = -(-cursor.offset // alignment) * alignment
    placed = {
        name: TensorInfo(t.shape, t.type, start + t.offset, t.row_bytes)
        for name, t in tensors.items()
    }
    _check_places(cursor, placed)
    return placed


def _check_places(cursor: _Cursor, tensors: dict[str, TensorInfo]) -> None:
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise UserError(f"{cursor.path}: tensor {name!r} overlaps another")
        end = tensor.offset + prod(tensor.shape[:-1]) * tensor.row_bytes
        if end > cursor.size:
            raise UserError(
                f"{cursor.path}: tensor {name!r} ends at byte {end}, the file at {cursor.size}; "
                "it was cut short: fetch it again"
            )
