"""A model's weights to 8 or 4 bits."""

from __future__ import annotations

import torch
from torch import Tensor

from qwen2.model.config import Quantisation
from qwen2.model.decoder import Qwen2
from qwen2.model.quantised_linear import quantised_weights


@torch.no_grad()
def quantise_model(model: Qwen2, method: str) -> Qwen2:
    """A model of the same kind with its weights in "int8" or "int4"; `model` stays as it is.

    Norms, biases, routers and the gate of shared experts are shared with `model`.

    Raises:
        UserError: an unknown method.
    """
    quantisation = Quantisation.parse({"method": method}, "quantise")
    config = model.config.model_copy(update={"quantisation": quantisation})
    with torch.device("meta"):
        quantised = Qwen2(config)
    state = model.state_dict()
    for name, format_ in quantised_weights(quantised).items():
        weight: Tensor = state.pop(name)
        parts = format_.quantise(weight)
        state |= {name + suffix: p for suffix, p in zip(format_.suffixes, parts, strict=True)}
    quantised.load_state_dict(state, assign=True)
    quantised.tie_weights()
    return quantised
