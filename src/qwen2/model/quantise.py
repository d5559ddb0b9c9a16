"""A model's weights to 8 or 4 bits, tensor by tensor: what is read is gone before the next is.

Norms, biases, routers and the gate of shared experts keep their type. Embedding and head become
int8 in either method, and rows that int4's chunks do not fill as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qwen2.common.errors import UserError
from qwen2.common.progress import Progress
from qwen2.common.runtime import in_threads
from qwen2.model.calibrate import Calibration, calibrated_layers
from qwen2.model.config import ModelConfig, Quantisation
from qwen2.model.decoder import Qwen2
from qwen2.model.linear import end_to_end
from qwen2.model.packing import dequantise_int8
from qwen2.model.quantised_linear import (
    Format,
    named_parts,
    quantised_types,
    quantised_weights,
)
from qwen2.model.stored import StoredTensor
from qwen2.model.weights import EMBEDDING, assemble, checked, read, row_blocks

BLOCK = 1 << 17  # weights that are rounded at a time: the search for scales holds several copies


def quantise_model(model: Qwen2, method: str, calibration: Calibration | None = None) -> Qwen2:
    """A model of the same kind with its weights in "int8" or "int4"; `model` stays as it is.

    `calibration` is windows of token ids, see calibrate.py: int4 is clearly better for it, int8
    does not need it.

    Raises:
        UserError: an unknown method, or a model that is quantised already.
    """
    stored = {name: _InMemory(tensor) for name, tensor in model.state_dict().items()}
    quantised = build_quantised(
        model.config, stored, Path("model"), model.dtype, model.device, method, calibration
    )
    return quantised.train(model.training)


@torch.no_grad()
def build_quantised(
    config: ModelConfig,
    stored: Mapping[str, StoredTensor],
    where: Path,
    dtype: torch.dtype,
    device: torch.device,
    method: str,
    calibration: Calibration | None = None,
) -> Qwen2:
    """The module of `config`, its weights quantised as they are read, the rest in `dtype`.

    Without a calibration weights are rounded as they are stored, not as `dtype` has them.

    Raises:
        UserError: as `weights.build` and `quantise_model`.
    """
    quantisation = Quantisation.parse({"method": method}, "quantise")
    if config.quantisation:
        raise UserError(
            f"{where}: is in {config.quantisation.method} already; quantise the original weights"
        )
    _, sources = checked(config, stored, where)
    with torch.device("meta"):
        model = Qwen2(config.model_copy(update={"quantisation": quantisation}))
    formats = {name: f for name, f in quantised_weights(model).items() if name in sources}
    in_layers = [name for name in formats if name.startswith("model.layers.")]
    later = set(in_layers) if calibration and method == "int4" else set()
    places = _places(model, dtype, device)
    state: dict[str, Tensor] = {}

    def keep(tensors: Mapping[str, Tensor]) -> None:
        state.update({n: places[n].copy_(t) if n in places else t for n, t in tensors.items()})

    done = 0
    with Progress(method, len(sources)) as progress:
        for name in [name for name in sources if name not in later]:
            if name in formats:
                own = [name + suffix for suffix in formats[name].suffixes]
                state.update({n: places[n] for n in own})
                _fill(sources[name], formats[name], [places[n] for n in own])
            else:
                keep({name: read(sources[name], dtype).to(device)})
            progress.update(done := done + 1)
        if later:
            assert calibration
            numbers, scale = state[EMBEDDING], state[EMBEDDING + "_scale"]
            for name, parts in calibrated_layers(
                config,
                sources,
                formats,
                lambda tokens: dequantise_int8(numbers[tokens], scale[tokens]),
                calibration,
                dtype,
                device,
            ):
                keep(named_parts(name, formats[name], parts))
                progress.update(done := done + 1)
    return assemble(model, state)


def _places(model: Qwen2, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Empty tensors for all parts of quantised weights, and for what inference computes as one.

    All of them at once: taken in turn with what rounding takes and returns, they leave holes.
    """
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    types = quantised_types(model)
    places: dict[str, Tensor] = {}
    for group in [*model.fusible(), *([name] for name in types)]:
        if group[0] in shapes and group[0] not in places:  # a tied head has no place of its own
            some = end_to_end([shapes[n] for n in group], types.get(group[0], dtype), device)
            places |= dict(zip(group, some, strict=True))
    return places


def _fill(source: StoredTensor, format_: Format, parts: Sequence[Tensor]) -> None:
    """Rows do not know of each other, so that no more of the source than blocks is in memory."""
    rows = [part.view(torch.Size(source.shape[:-1]).numel(), -1) for part in parts]

    def work(start: int, count: int) -> None:
        block = torch.empty(count, source.shape[-1])
        source.read_rows(start, block)
        for row, part in zip(rows, format_.quantise(block), strict=True):
            row[start : start + count] = part.view(count, -1)

    in_threads(work, row_blocks(source, BLOCK))


@dataclass(frozen=True)
class _InMemory:
    """A tensor of a module, as if it were stored."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def mapped(self) -> Tensor:
        return self.tensor

    def read_rows(self, start: int, out: Tensor) -> None:
        rows = self.tensor.flatten(0, -2) if self.tensor.ndim > 2 else self.tensor
        out.copy_(rows[start : start + len(out)])
