"""How to round a weight to 4 bits so that a layer's output changes least.

The output's squared error over a calibration text is tr(D H Dᵀ), D the error of the weight and
H = Σ x xᵀ over the inputs. Two means against it, used together:

- scale and minimum of each group are searched: several scales are tried, each with the numbers that
  it gives, then the pair that fits those numbers best, by least squares weighted by importance
  (as the K-quants of llama.cpp do, there without the freedom of the minimum's sign);
- columns are rounded one after the other, and what an error does to the output is made good by the
  columns that come after it (GPTQ, Frantar et al. 2022, algorithm 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qwen2.model.packing import GROUP, Parts, encode_int4, pack_int4

DAMPING = 0.01
"""Added to the diagonal of H, as a share of its mean (GPTQ, section 3.3)."""

STEPS = (10, 11, 12, 13, 14, 15, 15.5, 16, 17, 18, 19, 21, 23, 26, 29)
"""Steps tried between a group's least and greatest number; beyond 15 the ends are cut off. Fewer
find the grid again that weights lie on which were in 4 bits before."""


def fit_groups(groups: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum (...,) of groups (..., 32) for the least error, in fp32.

    The error of each number counts by its importance, positive and broadcastable to the groups.
    """
    least, greatest = groups.aminmax(dim=-1, keepdim=True)
    middle, span = (least + greatest) / 2, (greatest - least).clamp_min_(1e-12)
    total = importance.expand_as(groups).sum(-1)
    weighted = importance * groups
    sum_w, sum_ww = weighted.sum(-1), (weighted * groups).sum(-1)
    best = torch.full_like(sum_w, torch.inf)
    scale, minimum = torch.zeros_like(sum_w), torch.zeros_like(sum_w)
    for steps in STEPS:
        step = span / steps
        start = least if steps <= 15 else middle - 7.5 * step
        for _ in range(2):  # the second time by the scale that fitted the first
            q = groups.sub(start).div_(step).round_().clamp_(0, 15)
            iq = importance * q
            sum_q, sum_qq, sum_qw = iq.sum(-1), (iq * q).sum(-1), (iq * groups).sum(-1)
            spread = total * sum_qq - sum_q * sum_q
            fit = (total * sum_qw - sum_q * sum_w) / spread.where(spread > 0, 1)
            fit = fit.where(spread > 0, 0)
            shift = (sum_w - fit * sum_q) / total
            # the minimum of the quadratic form, at the fit
            error = sum_ww - fit * sum_qw - shift * sum_w
            better = error < best
            best = error.where(better, best)
            scale, minimum = fit.where(better, scale), shift.where(better, minimum)
            step, start = fit.clamp_min(1e-12)[..., None], shift[..., None]
    return scale, minimum


def search_int4(weight: Tensor) -> Parts:
    """weight (..., N, K) -> parts, for want of a text: what is large in its group counts more.

    The importance is that of llama.cpp without an importance matrix, sqrt(mean w² + w²).
    """
    groups = weight.float().unflatten(-1, (-1, GROUP))
    squares = groups.square()
    importance = squares.mean(-1, keepdim=True).add(squares).sqrt_().clamp_min_(1e-12)
    return encode_int4(groups, *fit_groups(groups, importance))


def compensate_int4(weight: Tensor, upper: Tensor) -> Parts:
    """weight (N, K), upper (K, K) of `inverse_factor` -> parts; later columns mend earlier ones."""
    weight = weight.to(torch.float32, copy=True)
    N, K = weight.shape
    numbers = torch.empty(N, K, dtype=torch.uint8, device=weight.device)
    scales, minima = weight.new_empty(2, N, K // GROUP, dtype=torch.float16)
    for group, begin in enumerate(range(0, K, GROUP)):
        end = begin + GROUP
        block, factor = weight[:, begin:end], upper[begin:end, begin:end]
        scale, minimum = fit_groups(block, factor.diagonal() ** -2.0)
        scales[:, group], minima[:, group] = scale, minimum
        step, start = scales[:, group].float(), minima[:, group].float()
        divisor = step.where(step != 0, 1)
        errors = weight.new_empty(GROUP, N)
        columns = block.t().contiguous()  # (32, N)
        for j in range(GROUP):
            q = columns[j].sub(start).div_(divisor).round_().clamp_(0, 15)
            numbers[:, begin + j] = q
            error = columns[j].sub(q.mul_(step).add_(start)).div_(factor[j, j])
            errors[j] = error
            columns[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
        weight[:, end:].addmm_(errors.t(), upper[begin:end, end:], alpha=-1)
    return pack_int4(numbers), scales, minima


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper Cholesky factor (K, K) of the inverse of H = Σ x xᵀ, damped."""
    h = hessian.clone()
    mean = h.diagonal().mean()
    h.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True)
