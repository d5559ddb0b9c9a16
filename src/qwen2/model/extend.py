"""Contexts longer than a model was trained on (report section 2.2.1).

Every way is a change of configuration alone: no weight and no file is edited.

    dca+yarn   Dual Chunk Attention with YARN's temperature beyond the trained length: what the
               report serves 131,072 tokens with. The default; shorter texts do not change.
    dca        without the temperature
    yarn       static YARN: other frequencies and a fixed temperature. It changes short texts too,
               so it has to be asked for by name.
    none       ordinary attention at positions that the model has never seen

The report does not state its chunks. Here C is the trained length L0, the least with which nothing
changes within it, and w = L0 / 16, as ChunkLlama has it.
"""

from __future__ import annotations

import typing
from typing import Any, Literal

import torch

from qwen2.common.errors import UserError
from qwen2.model.attention import scheme_of
from qwen2.model.config import DualChunk, ModelConfig, Yarn
from qwen2.model.decoder import Qwen2
from qwen2.model.rope import Rope

Method = Literal["dca+yarn", "dca", "yarn", "none"]
METHODS: tuple[str, ...] = typing.get_args(Method)
DEFAULT: Method = "dca+yarn"


def extend_context(config: ModelConfig, context: int, method: str = DEFAULT) -> ModelConfig:
    """`config` for contexts of `context` tokens: as it is, if it reaches so far, else by `method`.

    Raises:
        UserError: an unknown method, or windows slide that DCA does not know.
    """
    if method not in METHODS:
        raise UserError(f"extend {method!r}: choose one of {', '.join(METHODS)}")
    trained = config.trained_length
    reach = config.context_length if config.yarn or config.dual_chunk else trained
    if context <= reach:
        return config
    changes: dict[str, object] = {
        "max_position_embeddings": context,
        "yarn": None,
        "dual_chunk": None,
    }
    if method == "yarn":
        factor = context / trained
        changes["yarn"] = Yarn(factor=factor, original_max_position_embeddings=trained)
    elif method != "none":
        if config.sliding:
            raise UserError(
                f"context {context}: some layers of this model have sliding windows, which dual "
                "chunk attention does not know; extend it by 'yarn' or 'none'"
            )
        changes["dual_chunk"] = DualChunk(
            chunk_size=trained,
            local_size=max(1, trained // 16),
            original_max_position_embeddings=trained if method == "dca+yarn" else None,
        )
    return config.model_copy(update=changes)


def extended(model: Qwen2, context: int, method: str = DEFAULT) -> Qwen2:
    """A model of the same parameters (shared) for `context` tokens; see `extend_context`."""
    return with_config(model, **dict(extend_context(model.config, context, method)))


def describe_context(config: ModelConfig, trained: int) -> str:
    """In one line, how far `config` reaches and by what, for weights of `trained` tokens."""
    reach = config.context_length
    if chunk := config.dual_chunk:
        same = min(chunk.chunk_size, 2 * chunk.stride)  # all distances are the true ones
        heat = " and YARN's temperature" if chunk.original_max_position_embeddings else ""
        how = (
            f"dual chunk attention (chunks of {chunk.chunk_size:,}, window {chunk.local_size:,})"
            f"{heat}; up to {same:,} tokens nothing changes"
        )
    elif config.yarn:
        own = config.yarn.original_max_position_embeddings
        how = f"static YARN, factor {config.yarn.factor:g} over {own:,}; it changes short texts"
    elif reach > trained:
        how = f"ordinary attention, beyond the {trained:,} tokens of training"
    else:
        how = "as trained"
    return f"context {reach:,} tokens: {how}"


def with_config(model: Qwen2, **changes: Any) -> Qwen2:
    """A model of the same parameters (shared, not copied) whose configuration has `changes`.

    They may be of anything but the parameters' shapes: the base of the rotations, for instance.
    """
    config = ModelConfig.parse(model.config.model_dump() | changes, "model")
    with torch.device("meta"):
        changed = Qwen2(config)
    changed.load_state_dict(model.state_dict(), assign=True)
    changed.tie_weights()
    return changed


def reconfigure(model: Qwen2, config: ModelConfig) -> None:
    """As `with_config`, but in place: parameters stay the same objects, with their gradients."""
    model.config, model.scheme = config, scheme_of(config)
    model.model.rope = Rope(config.head_dim, config.rope_theta, config.yarn)
