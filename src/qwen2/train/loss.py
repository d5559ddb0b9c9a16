"""Cross-entropy from hidden states and the head's weight, block by block over the rows.

Logits are by far the largest tensors of a training step: N x V, in fp32 too, and again for their
gradient. Here they exist for one block of rows at a time, in the model's dtype and a few rows of it
in fp32, and turn into their gradient in place; those of hidden states and weight come from it in
the same pass. Equal to `F.cross_entropy` of `hidden @ weight.T`, the reference of the tests.

With it, in the same pass too, comes the z-loss of PaLM (Chowdhery et al. 2022, section 5): ζ·ln²Z
of each target, where ln Z is the logsumexp of its logits. Its gradient is 2ζ·ln Z·p.

Ranks of tensor parallelism have a share of the vocabulary each (Shoeybi et al. 2019, section 3):
they agree on a row's largest logit, its sum of exponentials and the logit of its target, three
numbers a row, and no rank ever sees the logits of another.

torch's `F.linear_cross_entropy` is not used: for bf16 input its loss is bf16 too (off by 0.01 to
1.5 nats), and its chunked path is 5 to 40 times slower on the CPU (torch 2.13).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from qwen2.common.errors import UserError
from qwen2.tokens.packing import IGNORE as IGNORE

BLOCK_BYTES = 1 << 28  # of logits at the same time; small blocks add up many weight gradients
CHUNK_BYTES = 1 << 23  # of them in fp32: small enough to stay in the cache between passes


class OutputZ:
    """The z-loss of the head: its coefficient ζ, and the parts of the losses that it went into.

    Both are sums over targets, divided by the `count` of the losses, as those are. It is no
    dataclass: FSDP hands a module copies of those.
    """

    def __init__(self, coefficient: float) -> None:
        self.coefficient = coefficient
        self.cross_entropy = 0.0
        self.square_log_z = 0.0
        """Without the coefficient."""


@dataclass(frozen=True)
class VocabularyShare:
    """Rows `first` and following of the head, `width` on each rank of `group` but the last ones."""

    group: dist.ProcessGroup
    first: int
    width: int


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    count: int | None = None,
    block: int | None = None,
    z: OutputZ | None = None,
    share: VocabularyShare | None = None,
) -> Tensor:
    """Sum over the targets' negative log-likelihoods, divided by `count`; and the z-loss likewise.

    Args:
        hidden: (N, C), after the final norm.
        weight: (V, C) of the output head, in the same dtype.
        targets: (N,) token ids; -100 where nothing is predicted.
        count: the divisor. None: the number of targets here, so that the result is their mean. A
            step of several micro-batches gives each the number of targets of all, so that their
            gradients add up to those of the one large batch.
        block: rows whose logits exist at the same time; None: what `BLOCK_BYTES` allow.
        z: the z-loss to add, where there is one; it takes in what the parts were.
        share: which rows of the whole head `weight` is; hidden and targets are the same on all
            ranks of its group. None: all.

    Returns:
        A scalar in nats, in fp32 (fp64 for fp64 input). With `share`, the gradient of `hidden` is
        this rank's part of a sum over the group.

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
    if block is None:
        width = share.width if share else weight.shape[0]  # the same on all ranks
        logit_bytes = hidden.shape[0] * width * weight.itemsize
        blocks = math.ceil(logit_bytes / BLOCK_BYTES) or 1
        block = math.ceil(len(hidden) / blocks) or 1  # all of about the same size
    with_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss: Tensor
    loss, cross_entropy, square_log_z = _ChunkedCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, count, block, with_gradient, z.coefficient if z else 0.0, share
    )
    if z is not None:
        z.cross_entropy += cross_entropy.item()
        z.square_log_z += square_log_z.item()
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
        block: int,
        with_gradient: bool,
        zeta: float,
        share: VocabularyShare | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        parts = torch.zeros(2, dtype=wide, device=hidden.device)  # cross-entropy, ln²Z
        hidden_grad = torch.empty_like(hidden)
        weight_grad: Tensor | None = None
        for first in range(0, len(hidden), block):
            part = slice(first, first + block)
            logits = hidden[part] @ weight.T  # (block, V)
            if share:
                parts += _shared_losses_and_errors(logits, targets[part], wide, zeta, share)
            else:
                parts += _losses_and_errors(logits, targets[part], wide, zeta)
            if with_gradient:
                torch.mm(logits, weight, out=hidden_grad[part])
                product = logits.T @ hidden[part]  # (V, C)
                if weight_grad is None:
                    weight_grad = product if part.stop >= len(hidden) else product.to(wide)
                else:
                    weight_grad += product
                del product
            del logits  # before the next block's are there
        if with_gradient:
            if weight_grad is None:  # no targets here
                weight_grad = torch.zeros_like(weight)
            ctx.save_for_backward(hidden_grad.div_(count), weight_grad.div_(count).to(weight.dtype))
        cross_entropy, square_log_z = parts / count
        ctx.mark_non_differentiable(cross_entropy, square_log_z)
        loss = cross_entropy + zeta * square_log_z if zeta else cross_entropy.clone()
        return loss, cross_entropy, square_log_z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: None) -> Any:
        hidden_grad, weight_grad = ctx.saved_tensors
        return hidden_grad * grad, weight_grad * grad, None, None, None, None, None, None


def _losses_and_errors(logits: Tensor, targets: Tensor, wide: torch.dtype, zeta: float) -> Tensor:
    """(2,) sums of -ln p and ln²Z of logits (rows, V), which become the gradient of their loss.

    Where zeta is 0, so is the sum of ln²Z, which nobody needs then.
    """
    sums = torch.zeros(2, dtype=wide, device=logits.device)
    chunk = max(1, CHUNK_BYTES // (wide.itemsize * logits.shape[1]))
    for part, at in zip(logits.split(chunk), targets[:, None].split(chunk), strict=True):
        log_p = torch.log_softmax(part, dim=-1, dtype=wide)
        of_targets = log_p.gather(1, at)
        sums[0] -= of_targets.sum()
        error = log_p.exp_()
        if zeta:
            log_z = part.gather(1, at).to(wide) - of_targets  # (rows, 1)
            sums[1] += log_z.square().sum()
            error *= 1 + 2 * zeta * log_z
        error.scatter_add_(1, at, torch.full_like(at, -1, dtype=wide))
        part.copy_(error)
    return sums


def _shared_losses_and_errors(
    logits: Tensor, targets: Tensor, wide: torch.dtype, zeta: float, share: VocabularyShare
) -> Tensor:
    """The same of this rank's columns of the logits (rows, V here); the sums are those of all."""
    chunk = max(1, CHUNK_BYTES // (wide.itemsize * max(1, logits.shape[1])))
    at = targets - share.first
    here = (at >= 0) & (at < logits.shape[1])
    at = at.where(here, 0)[:, None]
    largest = logits.amax(-1, keepdim=True).to(wide)  # (rows, 1)
    dist.all_reduce(largest, dist.ReduceOp.MAX, share.group)
    parts = list(zip(*(x.split(chunk) for x in (logits, largest, at, here[:, None])), strict=True))
    sums = torch.cat([(part.to(wide) - most).exp_().sum(1) for part, most, _, _ in parts])
    own = (logits.gather(1, at).to(wide) - largest)[:, 0] * here  # the target's, 0 elsewhere
    both = torch.stack((sums, own))  # (2, rows)
    dist.all_reduce(both, group=share.group)
    sums, own = both
    log_z = sums.log() + largest[:, 0]
    scale = ((1 + 2 * zeta * log_z) / sums)[:, None]  # (rows, 1)
    for (part, most, place, mine), factor in zip(parts, scale.split(chunk), strict=True):
        error = (part.to(wide) - most).exp_().mul_(factor)
        error.scatter_add_(1, place, -mine.to(wide))
        part.copy_(error)
    return torch.stack(((sums.log() - own).sum(), log_z.square().sum()))
