"""The decoder: one class for training and inference (report section 2.2.1).

`model(tokens, positions, attention)` takes tokens flat; see attention.py for the context. Names of
modules and parameters are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from qwen2.model import kernels
from qwen2.model.attention import AttentionContext, PackedAttention, SelfAttention, scheme_of
from qwen2.model.cache import KVStore, PagedAttention
from qwen2.model.config import ModelConfig, Quantisation
from qwen2.model.mlp import MLP
from qwen2.model.moe import MoE, Routing
from qwen2.model.quantised_linear import QuantisedEmbedding, linear_layer
from qwen2.model.rope import Rope, Rotary


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) · weight, in fp32 inside (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x (N, C) -> (N, C), in x's dtype."""
        return kernels.TABLE["norm"](x, self.weight, self.eps)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        C, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(C, eps)
        self.self_attn = SelfAttention(config, index)
        self.post_attention_layernorm = RMSNorm(C, eps)
        self.mlp = (
            MoE(config) if config.moe else MLP(C, config.intermediate_size, config.quantisation)
        )

    def forward(
        self,
        x: Tensor,
        rotary: Rotary,
        attention: AttentionContext,
        routing: Routing | None = None,
    ) -> Tensor:
        """x (N, C) -> (N, C); a mixture adds what its router did to `routing`."""
        x = x + self.self_attn(self.input_layernorm(x), rotary, attention)
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed, routing) if isinstance(self.mlp, MoE) else self.mlp(normed))


class Decoder(nn.Module):
    """Embedding, layers and final norm: the part that published names call `model`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        embedding = QuantisedEmbedding if config.quantisation else nn.Embedding
        self.embed_tokens = embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rope = Rope(config.head_dim, config.rope_theta, config.yarn)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: AttentionContext,
        routing: Routing | None = None,
    ) -> Tensor:
        """tokens and positions (N,) -> hidden states after the final norm (N, C).

        A mixture's layers add what their routers did to `routing`, where it is given.
        """
        x = self.embed_tokens(tokens).to(self.norm.weight.dtype)  # (N, C)
        rotary = attention.rotary(self.rope, positions, x.dtype)
        for layer in self.layers:
            x = layer(x, rotary, attention, routing)
        return self.norm(x)


class Qwen2(nn.Module):
    """A language model: decoder and output head, which may be the embedding itself."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.scheme = scheme_of(config)
        self.model = Decoder(config)
        head_bits = config.quantisation and Quantisation(method="int8")  # also in int4 models
        self.lm_head = linear_layer(config.hidden_size, config.vocab_size, False, head_bits)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head the embedding, where the configuration says so."""
        if self.config.tie_word_embeddings:
            for name, _ in self.model.embed_tokens.named_parameters():
                setattr(self.lm_head, name, getattr(self.model.embed_tokens, name))

    def packed(self, lengths: Sequence[int]) -> PackedAttention:
        """The attention context of documents laid end to end, as the configuration has it."""
        return PackedAttention(lengths, self.scheme)

    def cached(
        self, store: KVStore, tables: Sequence[Tensor], counts: Sequence[int]
    ) -> PagedAttention:
        """The attention context of new tokens after cached ones, as the configuration has it."""
        return PagedAttention(store, tables, counts, self.scheme)

    def fuse_projections(self) -> None:
        """Make inference faster: compute q, k, v as one product, and gate and up as one.

        The weights move into common memory, layer by layer, where they do not lie so already;
        parameters stay as they are. May be called again at no cost.
        """
        for module in self.modules():
            if isinstance(module, SelfAttention | MLP):
                module.projections.fuse()

    def fusible(self) -> Iterator[list[str]]:
        """Names of parameters that inference would have end to end in memory, group by group."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        for module in self.modules():
            if isinstance(module, SelfAttention | MLP):
                for group in filter(None, module.projections.groups()):
                    yield [names[id(parameter)] for parameter in group]

    def key_biases(self) -> list[Tensor]:
        """The bias (K D,) of every layer's keys."""
        attentions = (m for m in self.modules() if isinstance(m, SelfAttention))
        return [a.k_proj.bias for a in attentions if a.k_proj.bias is not None]

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The number type of activations, and of all parameters that are not quantised."""
        return self.model.norm.weight.dtype

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        attention: AttentionContext,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Logits (N, V) of tokens and positions (N,); of some `rows` only, when they are given."""
        hidden = self.model(tokens, positions, attention)
        return self.lm_head(hidden if rows is None else hidden[rows])


@torch.no_grad()
def init_weights(model: Qwen2, generator: torch.Generator) -> None:
    """Draw all parameters, in their order; in place."""
    for name, parameter in model.named_parameters():
        draw(name, parameter, model.config.initializer_range, generator)


def draw(name: str, tensor: Tensor, deviation: float, generator: torch.Generator) -> None:
    """Normal(0, deviation) for a matrix, ones for a norm, zeros for a bias; in place."""
    if name.endswith("norm.weight"):
        tensor.fill_(1.0)
    elif tensor.ndim == 1:
        tensor.zero_()
    else:
        tensor.normal_(0.0, deviation, generator=generator)
