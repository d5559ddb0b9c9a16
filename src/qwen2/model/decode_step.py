"""The whole pass of a dense decoder over a few tokens, in the native kernels.

A decode step is bound by reading the weights, and a token of the 0.5B would spend as long again
in Python and in operators that each wake the threads. Here the threads stay within one call for all
layers. The reference is the module's own pass, `Qwen2.forward`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int32, c_void_p
from typing import Any

import torch
from torch import Tensor

from qwen2.model.cache import KVStore
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2
from qwen2.model.native import CHUNK, TILE, Matrix, Store, Weight, call, product, why_not


class _Layer(Structure):
    _fields_ = [
        ("input_norm", c_void_p), ("post_norm", c_void_p),
        *((name, Matrix) for name in ("qkv", "o", "gate_up", "down")),
        ("store", Store),
    ]  # fmt: skip


class _Model(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("layers", "C", "H", "K", "D", "I", "V", "block_size")),
        ("eps", c_float), ("cos", c_void_p), ("sin", c_void_p), ("layer", POINTER(_Layer)),
        ("norm", c_void_p), ("embedding", Matrix), ("head", Matrix),
    ]  # fmt: skip


class _Batch(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("n", "sequences", "rows", "table_width")),
        *((n, c_void_p) for n in ("tokens", "positions", "starts", "tables", "wanted", "logits")),
    ]  # fmt: skip


def can_step(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `DecodeStep` cannot run such a model; None if it can."""
    if (reason := why_not()) is not None:
        return reason
    if device.type != "cpu" or dtype != torch.bfloat16:
        return "only for bf16 activations on the CPU"
    if config.moe or config.dual_chunk or config.sliding:
        return "only for dense models with plain causal attention"
    sizes = (config.hidden_size, config.intermediate_size)
    if any(size % CHUNK for size in sizes) or config.head_dim % 32 or config.vocab_size % TILE:
        return f"only for widths that are multiples of {CHUNK}, and heads of 32"
    return None


class DecodeStep:
    """One pass of a dense model over a few tokens of some sequences; see `can_step`.

    Reads the parameters and the store where they are: both stay in place while this is used.
    Activations stay in fp32 between products, and a token's result does not depend on the batch.
    """

    def __init__(self, model: Qwen2, store: KVStore, block_size: int) -> None:
        config = model.config
        assert can_step(config, model.dtype, model.device) is None
        model.fuse_projections()
        self._kept: list[Any] = []
        self._rope, self._positions = model.model.rope, 0
        layers = (_Layer * config.num_hidden_layers)()
        layer: Any
        for i, (own, layer) in enumerate(zip(layers, model.model.layers, strict=True)):
            attention, mlp = layer.self_attn, layer.mlp
            own.input_norm = self._floats(layer.input_layernorm.weight)
            own.post_norm = self._floats(layer.post_attention_layernorm.weight)
            own.qkv = self._weight(attention.projections.joint)
            own.o = self._weight(tuple(attention.o_proj.parts().values()))
            own.gate_up = self._weight(mlp.projections.joint)
            own.down = self._weight(tuple(mlp.down_proj.parts().values()))
            own.store = Store.of(store.layer(i))
        self._kept += [layers, store]
        head = self._weight(tuple(model.lm_head.parts().values()))
        self._head: Weight = self._kept[-1]
        embedding = head
        if not config.tie_word_embeddings:
            parts = (*model.model.embed_tokens.parameters(), None)
            embedding = self._weight(parts, embedding=True)
        self._model = _Model(
            config.num_hidden_layers, config.hidden_size, config.num_attention_heads,
            config.num_key_value_heads, config.head_dim, config.intermediate_size,
            config.vocab_size, block_size, config.rms_norm_eps, None, None, layers,
            self._floats(model.model.norm.weight), embedding, head,
        )  # fmt: skip
        self._reach(256)

    def __call__(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        counts: Sequence[int],
        blocks: Sequence[Sequence[int]],
        rows: Sequence[int],
    ) -> Tensor:
        """Logits (len(rows), V) fp32 of some of the tokens; keys and values go to the store.

        counts[i] consecutive tokens belong to the sequence whose tokens lie in blocks[i].
        """
        self._reach(max(positions) + 1)
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        width = max(map(len, blocks))
        tables = [token for table in blocks for token in (*table, *[0] * (width - len(table)))]
        logits = torch.empty((len(rows), self._model.V))
        arrays = [_integers(values) for values in (tokens, positions, starts, tables, rows)]
        batch = _Batch(
            len(tokens), len(counts), len(rows), width,
            *(ctypes.cast(array, c_void_p) for array in arrays), logits.data_ptr(),
        )  # fmt: skip
        call("step", byref(self._model), byref(batch))
        return logits

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (n, V) fp32 of a few final hidden states (n, C)."""
        return product(hidden.float(), self._head)

    def _reach(self, length: int) -> None:
        """Have the angles of positions before `length`."""
        if length <= self._positions:
            return
        self._positions = max(length, 2 * self._positions)
        cos, sin = self._rope.table(torch.arange(self._positions), torch.float32)
        self._angles = cos.contiguous(), sin.contiguous()
        self._model.cos, self._model.sin = (x.data_ptr() for x in self._angles)

    def _floats(self, parameter: Tensor) -> int:
        self._kept.append(parameter.detach().float())
        place: int = self._kept[-1].data_ptr()
        return place

    def _weight(self, parts: tuple[Tensor | None, ...], embedding: bool = False) -> Matrix:
        """Of the parts of a layer, or of layers that are joined: weight, its scales, bias."""
        weight, *others, bias = parts
        scale, minimum = [*others, None, None][:2]
        assert weight is not None
        self._kept.append(Weight(weight, scale, minimum, bias, embedding=embedding))
        matrix: Matrix = self._kept[-1].matrix
        return matrix


def _integers(values: Sequence[int]) -> ctypes.Array[c_int32]:
    return (c_int32 * len(values))(*values)
