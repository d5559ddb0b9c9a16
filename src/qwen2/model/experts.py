"""What the routed experts compute, from their stacked weights: two ways, with equal results.

    y_t = Σ_i w_ti · down_e (silu(gate_e x_t) * up_e x_t),   e = ids_ti      (report, equation 1)

`loop_experts` says it plainly. `grouped_experts` sorts the pairs of token and expert by expert, so
that each expert is a few large products on neighbouring rows, and has its own backward pass: what
autograd would make of the sort and of the slices of the stacks takes longer than the products do.

Shapes: N tokens, k experts of a token, M = N·k pairs, E experts, C model width, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2.common.runtime import in_threads
from qwen2.model import kernels

_products = kernels.TABLE["expert products"]
_outer_products = kernels.TABLE["expert gradients"]

ENOUGH = 1 << 29
"""Multiplications from which products are computed in threads of their own, see `_for_each`."""


def loop_experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The plain reference; see `grouped_experts`."""
    y = torch.zeros_like(x)
    for expert in range(len(gate_up)):
        token, place = torch.where(ids == expert)
        gate, up = F.linear(x[token], gate_up[expert]).chunk(2, dim=-1)
        out = F.linear(F.silu(gate) * up, down[expert]) * weights[token, place, None]
        y = y.index_add(0, token, out)
    return y


def grouped_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """The sum of each token's experts, weighted.

    x (N, C), gate_up (E, 2I, C), down (E, C, I), ids and weights (N, k), all but ids of one number
    type -> (N, C). Only experts that a token is sent to are touched.
    """
    apply: Callable[..., Tensor] = _GroupedExperts.apply
    return apply(x, gate_up, down, ids, weights)


class _GroupedExperts(torch.autograd.Function):
    """Keeps the input and the product before silu, and computes the rest again going back."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        (N, k), E = ids.shape, len(gate_up)
        order = ids.flatten().argsort(stable=True)  # (M,), pairs by expert
        counts = torch.bincount(ids.flatten(), minlength=E)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        rows = x.index_select(0, order // k)  # (M, C)
        hidden = _products(rows, gate_up.transpose(1, 2), counts)  # (M, 2I)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, gate_up, down, weights, order, back, counts, hidden)
        gate, up = hidden.chunk(2, dim=-1)
        out = _products(F.silu(gate).mul_(up), down.transpose(1, 2), counts)  # (M, C)
        out = out.index_select(0, back).unflatten(0, (N, k))
        y = x.new_empty(N, out.shape[2])  # no view: whoever gets one may not change it in place
        torch.bmm(weights[:, None], out, out=y[:, None])
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, weights, order, back, counts, hidden = ctx.saved_tensors
        N, k = weights.shape
        token = order // k
        drows = dy.index_select(0, token)  # (M, C), before the weight
        gate, up = hidden.chunk(2, dim=-1)
        sigmoid = torch.sigmoid(gate)
        silu = sigmoid * gate
        inner = silu * up  # (M, I)
        dinner = _products(drows, down, counts)  # (M, I), before the weight
        dweights = torch.linalg.vecdot(dinner, inner).index_select(0, back).view(N, k)
        scale = weights.flatten().index_select(0, order)[:, None]  # (M, 1)
        ddown = _outer_products(drows, inner.mul_(scale), counts)  # (E, C, I)
        dinner.mul_(scale)
        dhidden = torch.empty_like(hidden)
        dgate, dup = dhidden.chunk(2, dim=-1)
        torch.mul(dinner, silu, out=dup)
        # silu' = s + silu·(1 - s), s the sigmoid
        slope = silu.mul_(1 - sigmoid).add_(sigmoid)
        torch.mul(dinner.mul_(up), slope, out=dgate)
        dgate_up = _outer_products(dhidden, x.index_select(0, token), counts)  # (E, 2I, C)
        dx = _products(dhidden, gate_up, counts).index_select(0, back)  # (M, C)
        return dx.unflatten(0, (N, k)).sum(1), dgate_up, ddown, None, dweights


def threaded_products(rows: Tensor, matrices: Tensor, counts: Tensor) -> Tensor:
    """rows (M, A), the first counts[0] of them times matrices[0] of (E, A, B), ... -> (M, B).

    On the CPU `grouped_mm` is a loop of products too, but each into fresh memory: up to 1.3 times
    slower than this going forward, and up to 6 times for gradients of weights.
    """
    out = rows.new_empty(len(rows), matrices.shape[2])

    def product(expert: int, group: slice) -> None:
        torch.mm(rows[group], matrices[expert], out=out[group])

    _for_each(product, _groups(counts), out.numel() * rows.shape[1])
    return out


def threaded_outer_products(left: Tensor, right: Tensor, counts: Tensor) -> Tensor:
    """left (M, A), right (M, B): for each expert, left.T @ right over its rows -> (E, A, B)."""
    out = left.new_empty(len(counts), left.shape[1], right.shape[1])

    def product(expert: int, group: slice) -> None:
        torch.mm(left[group].t(), right[group], out=out[expert])

    groups = _groups(counts)
    _for_each(product, groups, left.numel() * right.shape[1])
    for expert in set(range(len(counts))).difference(expert for expert, _ in groups):
        out[expert].zero_()
    return out


def _groups(counts: Tensor) -> list[tuple[int, slice]]:
    """The experts that have rows, and which."""
    ends = list(accumulate(counts.tolist(), initial=0))
    return [(e, slice(*rows)) for e, rows in enumerate(pairwise(ends)) if rows[0] < rows[1]]


def _for_each(
    product: Callable[[int, slice], None], groups: list[tuple[int, slice]], multiplications: int
) -> None:
    """Compute the product of each group: a thread each, when there is enough to do.

    All threads at each of these small products meet too often: with one at each, 64 products of
    128 rows take two thirds of the time. Starting threads is a few tenths of a millisecond.
    """
    threads = torch.get_num_threads()
    if threads == 1 or multiplications < ENOUGH:
        for group in groups:
            product(*group)
        return

    def products(some: list[tuple[int, slice]]) -> None:
        for group in some:
            product(*group)

    size = -(-len(groups) // (4 * threads))  # several for each, as experts' shares differ
    in_threads(products, [(groups[i : i + size],) for i in range(0, len(groups), size)])
