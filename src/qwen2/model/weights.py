"""From stored tensors to a module: what every checkpoint format shares.

A format gives each tensor's published name, its shape and a way to read it. Here the names and
shapes are checked against a module on the meta device, before a byte of data is touched. A tensor
of the wanted number type is a private, copy-on-write mapping of its file: it costs no memory until
it is used, and writing to it never changes the file. Others are converted in blocks of rows, a
thread each, so the source never stands in memory as a whole.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qwen2.common.errors import UserError
from qwen2.common.runtime import in_threads
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2
from qwen2.model.linear import end_to_end
from qwen2.model.quantised_linear import quantised_types
from qwen2.model.stacks import Joined, Piece, layout_of, pieces_of
from qwen2.model.stored import StoredTensor

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.norm.weight"
_EMBEDDING_PART, _HEAD_PART = "model.embed_tokens.", "lm_head."

PLAIN_BLOCK, QUANTISED_BLOCK = 1 << 20, 1 << 19
"""Elements converted at a time: opening a file and calls cost little beside them, and what
dequantising takes in between stays in the cache."""

# Buffers that older versions of transformers saved; they follow from the configuration.
_IGNORED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def build(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    where: Path,
    dtype: torch.dtype,
    device: torch.device,
    joined: bool = False,
) -> Qwen2:
    """The module of `config` with its parameters read from `stored`, in `dtype` on `device`.

    Weights that inference computes as one product lie end to end if they are converted, or in any
    case with `joined`: mapped ones would be copied later, and stay in memory a second time.

    Raises:
        UserError: a tensor is missing, unknown or of a wrong shape, or a tied head differs.
    """
    model, sources = checked(config, stored, where)
    kept = quantised_types(model)
    types = {name: kept.get(name, dtype) for name in sources}
    state = _read_all(sources, list(model.fusible()), types, device, joined)
    return assemble(model, state)


def assemble(model: Qwen2, state: dict[str, Tensor]) -> Qwen2:
    """`model`, from the meta device, with the parameters of `state`; a tied head is not in it."""
    for name in tied_names(model.config, model.state_dict()):
        state[name] = state[name.replace(_HEAD_PART, _EMBEDDING_PART)]
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    return model


def checked(
    config: ModelConfig, stored: Mapping[str, StoredTensor], where: Path
) -> tuple[Qwen2, dict[str, StoredTensor]]:
    """The module of `config` on the meta device, and where `stored` has each of its parameters.

    A tied head is not among them.

    Raises:
        UserError: as `build`.
    """
    stored = {n: tensor for n, tensor in stored.items() if not _is_ignored(n, config)}
    model = _meta_module(config, stored, where)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = tied_names(config, shapes)
    for name in tied:
        if name not in stored:
            del shapes[name]
    layout = layout_of(stored)
    pieces = {name: pieces_of(name, shape, layout) for name, shape in shapes.items()}
    expected = {piece.name: piece.shape for parts in pieces.values() for piece in parts}
    _check_names(expected, stored, where)
    for name, shape in expected.items():
        if stored[name].shape != shape:
            raise UserError(
                f"{where}: tensor {name!r} has shape {list(stored[name].shape)}, the configuration "
                f"asks for {list(shape)}"
            )
    _check_types(expected, quantised_types(model), stored, where)
    for name in tied:
        if name in stored:
            _check_tied(stored, name, where)
            del shapes[name]
    return model, {name: _source(shape, pieces[name], stored) for name, shape in shapes.items()}


def on_meta(config: ModelConfig) -> Qwen2:
    """The module of `config` without any memory for its parameters."""
    with torch.device("meta"), WithoutInit():
        return Qwen2(config)


def tied_names(config: ModelConfig, names: Collection[str]) -> list[str]:
    """Those of `names` that are the head's, if it is the embedding."""
    return [n for n in names if config.tie_word_embeddings and n.startswith(_HEAD_PART)]


def read(stored: StoredTensor, dtype: torch.dtype) -> Tensor:
    """A copy of the whole tensor in `dtype`, in memory of its own."""
    tensor = torch.empty(stored.shape, dtype=dtype)
    _fill([(stored, tensor)])
    return tensor


def _source(
    shape: tuple[int, ...], pieces: list[Piece], stored: Mapping[str, StoredTensor]
) -> StoredTensor:
    return stored[pieces[0].name] if len(pieces) == 1 else Joined(shape, pieces, stored)


def _is_ignored(name: str, config: ModelConfig) -> bool:
    """Whether a stored tensor says nothing: also a gate before shared experts of no width."""
    no_shared = config.moe is not None and not config.moe.shared_expert_intermediate_size
    return bool(_IGNORED.fullmatch(name)) or (no_shared and ".mlp.shared_expert" in name)


def _read_all(
    stored: Mapping[str, StoredTensor],
    groups: Sequence[Sequence[str]],
    types: Mapping[str, torch.dtype],
    device: torch.device,
    joined: bool,
) -> dict[str, Tensor]:
    """The tensors in `types` on `device`; on the CPU and in their own type they stay mapped.

    Those that are converted lie end to end where `groups` says so; all of `groups` if `joined`.
    """
    copied = {name for name in stored if stored[name].dtype != types[name]}
    if joined:
        copied = copied.union(*groups)
    groups = [group for group in groups if copied.issuperset(group)]
    alone = copied.difference(*groups)
    state = {name: stored[name].mapped().to(device) for name in stored if name not in copied}
    for group in [*groups, *([name] for name in stored if name in alone)]:
        shapes = [torch.Size(stored[name].shape) for name in group]
        state.update(zip(group, end_to_end(shapes, types[group[0]], device), strict=True))
    # All memory that stays has been taken: what conversion takes and returns leaves no holes in it.
    _fill([(stored[name], state[name]) for name in stored if name in copied])
    return state


def _fill(pairs: Sequence[tuple[StoredTensor, Tensor]]) -> None:
    """Read each stored tensor into the one beside it, in blocks of rows."""
    in_threads(
        lambda stored, out, start, rows: stored.read_rows(start, _rows(out, start, rows)),
        [(*pair, *block) for pair in pairs for block in row_blocks(pair[0])],
    )


def row_blocks(stored: StoredTensor, elements: int | None = None) -> list[tuple[int, int]]:
    """(start, rows) of consecutive blocks of so many elements; a vector is one."""
    *outer, width = stored.shape
    if not outer:
        return [(0, width)]
    if elements is None:
        elements = QUANTISED_BLOCK if stored.dtype is None else PLAIN_BLOCK
    count, step = prod(outer), max(1, elements // width)
    return [(start, min(step, count - start)) for start in range(0, count, step)]


def _rows(tensor: Tensor, start: int, count: int) -> Tensor:
    """Rows of the last dimension (count, width); of a vector, elements."""
    flat = tensor.flatten(0, -2) if tensor.ndim > 2 else tensor
    return flat[start : start + count]


def _meta_module(config: ModelConfig, stored: Collection[str], where: Path) -> Qwen2:
    # Building takes time by the layer: a nonsensical count must fail before, not after.
    found = {name.split(".")[2] for name in stored if name.startswith("model.layers.")}
    if len(found) != config.num_hidden_layers:
        raise UserError(
            f"{where}: tensors of {len(found)} layers, the configuration asks for "
            f"{config.num_hidden_layers}"
        )
    try:
        return on_meta(config)
    except (RuntimeError, OverflowError, TypeError):
        raise UserError(f"{where}: the sizes in its configuration exceed any machine") from None


class WithoutInit(TorchFunctionMode):
    """Leave new parameters as they are: random numbers on meta import torch.compile, a second."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Collection[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return None
        return function(*args, **(kwargs or {}))


def _check_names(expected: Collection[str], stored: Collection[str], where: Path) -> None:
    missing = [name for name in expected if name not in stored]
    unknown = sorted(name for name in stored if name not in expected)
    if missing:
        near = difflib.get_close_matches(missing[0], unknown, n=1)
        hint = f"; it has {near[0]!r}" if near else ""
        raise UserError(f"{where}: tensor {missing[0]!r} is missing{_more(missing)}{hint}")
    if unknown:
        near = difflib.get_close_matches(unknown[0], list(expected), n=1)
        hint = f"; the nearest known name is {near[0]!r}" if near else ""
        raise UserError(f"{where}: unknown tensor {unknown[0]!r}{_more(unknown)}{hint}")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_types(
    expected: Collection[str],
    quantised: Mapping[str, torch.dtype],
    stored: Mapping[str, StoredTensor],
    where: Path,
) -> None:
    """Parts of quantised weights have one type each; all other tensors are not of integers."""
    for name in expected:
        found, wanted = stored[name].dtype, quantised.get(name)
        if found != wanted if wanted else found in (torch.int8, torch.uint8):
            raise UserError(
                f"{where}: tensor {name!r} is of type {found}, expected "
                f"{wanted or 'numbers that are not quantised'}"
            )


def _check_tied(stored: Mapping[str, StoredTensor], name: str, where: Path) -> None:
    """Some files of tied models carry the head as well: it must be the embedding."""
    part = name.replace(_HEAD_PART, _EMBEDDING_PART)
    embedding, head = stored[part], stored[name]
    for start, rows in row_blocks(embedding):
        one, other = torch.empty(2, rows, *embedding.shape[1:])
        embedding.read_rows(start, one)
        head.read_rows(start, other)
        if not torch.equal(one, other):
            raise UserError(
                f"{where}: tie_word_embeddings is true, but {name!r} differs from {part!r}; "
                "set it to false or remove one of them"
            )
