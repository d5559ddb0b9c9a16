"""`config.json` of the published checkpoints, to and from `ModelConfig`.

What this code cannot honour is refused by name, never ignored. Both spellings of the rotations are
read: `rope_theta` with `rope_scaling` as published, and the `rope_parameters` of transformers 5;
likewise `type` and `rope_type`.
"""

from __future__ import annotations

from typing import Any, TypeVar

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.model.config import (
    DualChunk,
    Mixture,
    ModelConfig,
    Quantisation,
    SlidingWindow,
    Yarn,
)
from qwen2.model.packing import GROUP

DENSE, MIXTURE = "qwen2", "qwen2_moe"
_ARCHITECTURES = {DENSE: "Qwen2ForCausalLM", MIXTURE: "Qwen2MoeForCausalLM"}
C = TypeVar("C", bound=Config)

_OURS = {
    "moe",
    "yarn",
    "dual_chunk",
    "sliding",
    "quantisation",
}  # fields that config.json spells otherwise


def config_from_hf(values: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """Read a published `config.json`.

    Raises:
        UserError: another model, or a setting that this code does not have; `where` names the file.
    """
    kind = values.get("model_type")
    if kind not in _ARCHITECTURES:
        raise UserError(f"{where}: model_type {kind!r}, expected {DENSE!r} or {MIXTURE!r}")
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {values['hidden_act']!r}, expected 'silu'")
    known: dict[str, Any] = {
        key: values[key] for key in ModelConfig.model_fields if key in values and key not in _OURS
    }
    known |= _rope(values, where)
    if kind == MIXTURE:
        known["moe"] = _mixture(values, where)
    if values.get("use_sliding_window"):
        known["sliding"] = _sliding(values, where)
    if chunks := values.get("dual_chunk_attention_config"):
        known["dual_chunk"] = _known(DualChunk, chunks, f"{where}: dual_chunk_attention_config")
    if (quantised := values.get("quantization_config")) is not None:
        known["quantisation"] = _quantisation(quantised, where)
    config = ModelConfig.parse(known, where)
    if values.get("head_dim") not in (None, config.head_dim):
        raise UserError(
            f"{where}: head_dim {values['head_dim']}, but hidden_size / num_attention_heads "
            f"is {config.head_dim}"
        )
    return config


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The `config.json` that transformers, vLLM and llama.cpp's converter read."""
    kind = MIXTURE if config.moe else DENSE
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "use_sliding_window": config.sliding is not None,
        "torch_dtype": dtype,
        "use_cache": True,
        **config.model_dump(exclude=_OURS),
    }
    if config.moe:
        values |= config.moe.model_dump()
        values |= {"decoder_sparse_step": 1, "mlp_only_layers": [], "output_router_logits": False}
    if config.yarn:
        values["rope_scaling"] = {"type": "yarn", **config.yarn.model_dump(exclude_none=True)}
    if config.dual_chunk:
        values["dual_chunk_attention_config"] = config.dual_chunk.model_dump(exclude_none=True)
    if config.sliding:
        layers = range(config.num_hidden_layers)
        values |= {
            "sliding_window": config.sliding.size,
            "max_window_layers": min(config.sliding.layers, default=config.num_hidden_layers),
            "layer_types": [
                "sliding_attention" if config.window(i) else "full_attention" for i in layers
            ],
        }
    if config.quantisation:
        values["quantization_config"] = _quantisation_to_hf(config.quantisation)
    return values


def _quantisation(values: Any, where: str) -> Quantisation:
    """Our own methods only: others' weights are laid out otherwise."""
    for method in ("int8", "int4"):
        quantisation = Quantisation(method=method)
        if values == _quantisation_to_hf(quantisation):
            return quantisation
    found = values.get("quant_method") if isinstance(values, dict) else values
    if found in _METHODS.values():
        raise UserError(f"{where}: quantization_config {values} is not one that is known here")
    raise UserError(
        f"{where}: weights quantised by {found!r}, which are not readable here; take the "
        "checkpoint in bf16, with --quantize int8 or int4, or a GGUF file"
    )


_METHODS = {"int8": "qwen2-int8", "int4": "qwen2-int4"}


def _quantisation_to_hf(quantisation: Quantisation) -> dict[str, Any]:
    values: dict[str, Any] = {"quant_method": _METHODS[quantisation.method]}
    return values if quantisation.method == "int8" else values | {"group_size": GROUP}


def _rope(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Base and scaling of the rotations."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{where}: rope_scaling {rope!r}, expected keys and values")
    base = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base
    if kind != "yarn":
        raise UserError(f"{where}: rope scaling {kind!r}; only 'yarn' is known: remove it")
    scaling = {k: v for k, v in rope.items() if k not in ("type", "rope_type", "rope_theta")}
    trained = values.get("max_position_embeddings")
    if scaling.get("original_max_position_embeddings") is None:
        scaling["original_max_position_embeddings"] = trained
    elif scaling.get("factor") is None and isinstance(trained, int):
        scaling["factor"] = trained / scaling["original_max_position_embeddings"]
    return base | {"yarn": Yarn.parse(scaling, f"{where}: rope_scaling")}


def _mixture(values: dict[str, Any], where: str) -> Mixture:
    for key, plain in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if values.get(key) not in (None, plain):
            raise UserError(
                f"{where}: {key} {values[key]!r}; every layer of these models has experts: "
                f"expected {plain!r}"
            )
    return _known(Mixture, values, where)


def _sliding(values: dict[str, Any], where: str) -> SlidingWindow:
    """Layers from `max_window_layers` on slide, unless `layer_types` names each."""
    count, first = values.get("num_hidden_layers"), values.get("max_window_layers", 28)
    if not isinstance(count, int) or not isinstance(first, int):
        raise UserError(f"{where}: max_window_layers {first!r}, expected a number of layers")
    types = values.get("layer_types")
    if types is None:
        types = ["full_attention"] * first + ["sliding_attention"] * (count - first)
    names = {"full_attention": False, "sliding_attention": True}
    if not isinstance(types, list) or not all(kind in names for kind in types):
        raise UserError(f"{where}: layer_types must be a list of {' and '.join(names)}")
    layers = tuple(i for i, kind in enumerate(types[:count]) if names[kind])
    values = {"size": values.get("sliding_window", 4096), "layers": layers}
    return SlidingWindow.parse(values, f"{where}: sliding_window")


def _known(cls: type[C], values: Any, where: str) -> C:
    """The fields of `cls` among `values`, which may hold others."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected keys and values")
    return cls.parse({key: values[key] for key in cls.model_fields if key in values}, where)
