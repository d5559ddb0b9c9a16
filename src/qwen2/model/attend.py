"""Softmax attention over several sets of keys, each computed alone and merged by log-sum-exp.

A query may meet different keys through different rotations (Dual Chunk Attention), or some of them
under a causal mask and others without one (a prefill that goes on). Each set is a `Part`, which the
flash kernel computes without a T x S matrix; with lse_n the log of the sum of a part's
exponentiated scores,

    out = Σ_n softmax_n(lse_n) · out_n        in fp32

equals the softmax over all keys together. The backward pass gives the kernel the merged output and
the merged lse, with which its formula yields each part's share of the exact gradient, as in ring
attention (Liu et al. 2023). `plain_part` is the reference, and what other devices get.

Of documents laid end to end each is one call of the kernel; on CUDA all are one call together,
which knows where each begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen2.model import kernels

PLAIN_ROWS = 256  # queries whose scores exist at the same time in the plain path


class Part(NamedTuple):
    """Queries (T, H, D) and the keys and values (S, K, D) that they see.

    All of them, or with `causal`, where S = T, query t those up to t.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    causal: bool


@dataclass
class Documents:
    """The lengths of documents that lie end to end, and where they end, once for all layers."""

    lengths: Sequence[int]
    _ends: dict[torch.device, Tensor] = field(default_factory=dict)

    def ends(self, device: torch.device) -> Tensor:
        """0, and the number of tokens up to the end of each document: (documents + 1,), int32."""
        if device not in self._ends:
            ends = [*accumulate(self.lengths, initial=0)]
            self._ends[device] = torch.tensor(ends, dtype=torch.int32, device=device)
        return self._ends[device]


def attend(parts: Sequence[Part]) -> Tensor:
    """Attention of the same T queries, rotated for each part, over the keys of all parts.

    Groups of query heads share a kv head by a stride of zero, never by a copy. fp16 is computed in
    fp32: |q·k| of these models overflows it. Returns (T, H, D).
    """
    T, H, D = parts[0].q.shape
    dtype = parts[0].q.dtype
    if dtype == torch.float16:
        parts = [Part(q.float(), k.float(), v.float(), causal) for q, k, v, causal in parts]
    K = parts[0].k.shape[1]
    inputs = [tensor for part in parts for tensor in _heads_first(part)]
    causal = [part.causal and T > 1 for part in parts]
    if len(parts) == 1:
        q, k, v = inputs
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal[0])
    else:
        out = kernels.TABLE["merged attention"](*inputs, causal)
    if T == 1:
        return out.reshape(1, H, D).to(dtype)
    return out.to(dtype).view(K, H // K, T, D).permute(2, 0, 1, 3).reshape(T, H, D)


def each_document(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention within each document: q (N, H, D), k and v (N, K, D) -> (N, H, D)."""
    each = zip(*(x.split(list(documents.lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([attend([Part(q, k, v, causal=True)]) for q, k, v in each])


def all_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """The same in one call, on CUDA."""
    from torch.nn.attention import varlen  # brings torch.compile along: a second

    ends, longest = documents.ends(q.device), max(documents.lengths)
    out = varlen.varlen_attn(
        q, k, v, ends, ends, longest, longest,
        window_size=(-1, 0),  # causal
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    assert isinstance(out, Tensor)  # no log-sum-exp was asked for
    return out


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> Tensor:
    """Outputs (…, T, D) and log-sum-exps (…, T) of parts -> the output over all, (…, T, D)."""
    return _merge(outs, lses)[0]


def plain_parts(*operands: Any) -> Tensor:
    """The plain reference: q, k and v of each part, see `plain_part`, and which are causal."""
    *inputs, causal = operands
    triples = zip(inputs[::3], inputs[1::3], inputs[2::3], causal, strict=True)
    return merge(*zip(*(plain_part(*triple) for triple in triples), strict=True))


def flash_parts(*operands: Any) -> Tensor:
    """The same by torch's kernel that gives the lse along with the output."""
    *inputs, causal = operands
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        merged: Tensor = _Merged.apply(causal, *inputs)  # type: ignore[no-untyped-call]
        return merged
    return _forward(causal, inputs)[0]


def plain_part(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The plain reference: q (K, G, T, D), k and v (K, G, S, D) -> (K, G, T, D), (K, G, T)."""
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, lses = [], []
    for first in range(0, T, PLAIN_ROWS):
        rows = q[..., first : first + PLAIN_ROWS, :].to(wide)
        scores = rows @ k.to(wide).transpose(-1, -2) / D**0.5
        if causal:
            seen = torch.arange(S, device=q.device) <= torch.arange(
                first, first + rows.shape[-2], device=q.device
            ).unsqueeze(-1)
            scores = scores.masked_fill(~seen, -torch.inf)
        outs.append((scores.softmax(-1) @ v.to(wide)).to(q.dtype))
        lses.append(scores.logsumexp(-1))
    return torch.cat(outs, dim=-2), torch.cat(lses, dim=-1)


def _merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    lse = torch.stack(tuple(lses)).logsumexp(0)
    wide = lse.dtype
    total = torch.zeros_like(outs[0], dtype=wide)
    for out, own in zip(outs, lses, strict=True):
        total = total + out.to(wide) * (own - lse).exp().unsqueeze(-1)
    return total.to(outs[0].dtype), lse


def _heads_first(part: Part) -> tuple[Tensor, Tensor, Tensor]:
    """q as (K, G, T, D), k and v as (K, G, S, D); with T = 1, G and T change places.

    One query's groups are then the rows of one product.
    """
    T, H, D = part.q.shape
    K = part.k.shape[1]
    k, v = (x.transpose(0, 1)[:, None] for x in (part.k, part.v))  # (K, 1, S, D)
    if T == 1:
        return part.q.view(K, 1, H // K, D), k, v
    q = part.q.view(T, K, H // K, D).permute(1, 2, 0, 3)
    return q, k.expand(-1, H // K, -1, -1), v.expand(-1, H // K, -1, -1)


def _forward(
    causal: Sequence[bool], inputs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, list[tuple[Any, ...]]]:
    """Merged output and lse, and what the kernel's backward wants besides."""
    outs, lses, others = [], [], []
    for number, masked in enumerate(causal):
        q, k, v = inputs[3 * number : 3 * number + 3]
        if q.device.type == "cpu":
            out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                q, k, v, 0.0, masked
            )
        else:
            out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, masked
            )
        outs.append(out)
        lses.append(lse)
        others.append(tuple(rest[:6]))
    return (*_merge(outs, lses), others)


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    gradients: tuple[Tensor, Tensor, Tensor]
    if q.device.type == "cpu":
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal
        )
    else:
        cum_q, cum_k, max_q, max_k, seed, offset = rest
        gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, 0.0, causal, seed, offset
        )
    return gradients


class _Merged(torch.autograd.Function):
    """`attend` of several parts by the flash kernel, with its gradient."""

    @staticmethod
    def forward(ctx: Any, causal: Sequence[bool], *inputs: Tensor) -> Tensor:
        out, lse, ctx.others = _forward(causal, inputs)
        ctx.causal = causal
        ctx.save_for_backward(out, lse, *inputs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        out, lse, *inputs = ctx.saved_tensors
        gradients: list[Tensor] = []
        for number, (causal, rest) in enumerate(zip(ctx.causal, ctx.others, strict=True)):
            q, k, v = inputs[3 * number : 3 * number + 3]
            gradients += _backward(grad, q, k, v, out, lse, causal, rest)
        return None, *gradients
