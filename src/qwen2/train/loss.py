"""Cross-entropy from hidden states and the head's weight, chunk by chunk over the rows.

Logits of a vocabulary of 150k are by far the largest tensors of a training step: N x V in fp32, and
again for their gradient. Here they exist for one chunk of rows at a time, and the gradients of
hidden states and weight are computed in the same pass. Equal to `F.cross_entropy` of
`hidden @ weight.T`, which is the reference of the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen2.common.errors import UserError

IGNORE = -100
CHUNK = 512


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, count: int | None = None, chunk: int = CHUNK
) -> Tensor:
    """Sum over the targets' negative log-likelihoods, divided by `count`.

    Args:
        hidden: (N, C), after the final norm.
        weight: (V, C) of the output head, in the same dtype.
        targets: (N,) token ids; -100 where nothing is predicted.
        count: the divisor. None: the number of targets here, so that the result is their mean. A
            step of several micro-batches gives each the number of targets of all, so that their
            gradients add up to those of the one large batch.
        chunk: rows whose logits exist at the same time.

    Returns:
        A scalar in nats, in fp32 (fp64 for fp64 input).

    Raises:
        UserError: there is no target, and `count` does not say that others have some.
    """
    wanted = targets != IGNORE
    here = int(wanted.sum())
    if count is None:
        count = here
    if not count:
        raise UserError("loss: every target is -100; the batch has nothing to predict")
    if here < len(targets):
        hidden, targets = hidden[wanted], targets[wanted]
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, count, chunk, with_gradient
    )
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Forward computes the gradients too, for then no logits need to be kept or made again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        count: int,
        chunk: int,
        with_gradient: bool,
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=hidden.device)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=wide) if with_gradient else None
        for first in range(0, len(hidden), chunk):
            part = slice(first, first + chunk)
            loss, error = _rows(hidden[part] @ weight.T, targets[part], wide)
            total += loss
            if weight_grad is not None:
                torch.mm(error, weight, out=hidden_grad[part])
                weight_grad += error.T @ hidden[part]
        if weight_grad is not None:
            ctx.save_for_backward(hidden_grad.div_(count), weight_grad.div_(count).to(weight.dtype))
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grad, weight_grad * grad, None, None, None, None


def _rows(logits: Tensor, targets: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """The summed loss of a chunk and its gradient (rows, V) with respect to the logits."""
    at = targets[:, None]
    top, top_at = logits.max(dim=-1, keepdim=True)
    p = torch.softmax(logits, dim=-1, dtype=wide)
    # The largest probability is at least 1/V, so its logarithm is safe where the target's is not.
    losses = (top - logits.gather(1, at)).to(wide) - p.gather(1, top_at).log()
    p.scatter_add_(1, at, torch.full_like(losses, -1.0))
    return losses.sum(), p.to(logits.dtype)
