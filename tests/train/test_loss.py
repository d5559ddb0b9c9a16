"""The blockwise cross-entropy is F.cross_entropy of the logits, in value and gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qwen2.common.errors import UserError
from qwen2.train.loss import IGNORE, OutputZ, chunked_cross_entropy

N, C, V = 23, 8, 37


def problem(dtype: torch.dtype, seed: int = 0, ignored: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, C, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (N,), generator=generator)
    targets[torch.randperm(N, generator=generator)[:ignored]] = IGNORE
    return hidden, weight, targets


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return F.cross_entropy((hidden @ weight.T).to(wide), targets)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


@settings(max_examples=25)
@given(block=st.integers(1, N + 1), ignored=st.integers(0, N - 1), seed=st.integers(0, 99))
def test_equals_the_plain_loss_in_fp32(block: int, ignored: int, seed: int) -> None:
    hidden, weight, targets = problem(torch.float32, seed, ignored)
    ours = chunked_cross_entropy(hidden, weight, targets, block=block)
    plain = reference(hidden, weight, targets)
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(
        gradients(ours, hidden, weight), gradients(plain, hidden, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_bf16_is_as_near_to_the_truth_as_the_plain_loss() -> None:
    hidden, weight, targets = problem(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth = gradients(reference(*exact, targets), *exact)
    ours = chunked_cross_entropy(hidden, weight, targets, block=7)
    torch.testing.assert_close(ours, reference(hidden, weight, targets), rtol=1e-3, atol=1e-3)
    for mine, theirs, true in zip(
        gradients(ours, hidden, weight),
        gradients(reference(hidden, weight, targets), hidden, weight),
        truth,
        strict=True,
    ):
        assert (mine - true).norm() <= 1.2 * (theirs - true).norm() + 1e-4 * true.norm()


def test_gradcheck_in_fp64() -> None:
    hidden, weight, targets = problem(torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, targets, block=6), (hidden, weight)
    )


def test_upstream_gradient_scales() -> None:
    hidden, weight, targets = problem(torch.float32)
    loss = chunked_cross_entropy(hidden, weight, targets)
    (once,) = gradients(loss, hidden)
    (thrice,) = gradients(3 * chunked_cross_entropy(hidden, weight, targets), hidden)
    torch.testing.assert_close(thrice, 3 * once)


def test_parts_with_a_common_count_add_up() -> None:
    hidden, weight, targets = problem(torch.float32)
    count = int((targets != IGNORE).sum())
    parts = [
        chunked_cross_entropy(hidden[part], weight, targets[part], count)
        for part in (slice(0, 9), slice(9, None))
    ]
    torch.testing.assert_close(sum(parts), reference(hidden, weight, targets))


def test_hand_worked() -> None:
    # Logits (0, ln 3): probabilities 1/4 and 3/4. Losses ln 4 and ln 4/3, gradients p - 1.
    hidden = torch.tensor([[1.0], [1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [torch.tensor(3.0).log()]], requires_grad=True)
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((1.3862944 + 0.2876821) / 2, abs=1e-6)
    (weight_grad,) = gradients(loss, weight)
    assert weight_grad.flatten().tolist() == pytest.approx([(-0.75 + 0.25) / 2, 0.25], abs=1e-6)


def test_a_hopeless_target_has_a_finite_loss() -> None:
    hidden, weight = torch.ones(1, 1), torch.tensor([[0.0], [1000.0]])
    assert chunked_cross_entropy(hidden, weight, torch.tensor([0])).item() == 1000.0


def test_without_gradients_none_are_computed() -> None:
    hidden, weight, targets = problem(torch.float32)
    with torch.no_grad():
        loss = chunked_cross_entropy(hidden, weight, targets)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference(hidden, weight, targets))


def test_nothing_to_predict_is_an_error() -> None:
    hidden, weight, targets = problem(torch.float32, ignored=N)
    with pytest.raises(UserError, match="every target is -100"):
        chunked_cross_entropy(hidden, weight, targets)
    # As one of several micro-batches it adds nothing.
    loss = chunked_cross_entropy(hidden, weight, targets, count=4)
    assert loss.item() == 0
    assert all(g.abs().max() == 0 for g in gradients(loss, hidden, weight))


@settings(max_examples=25)
@given(
    block=st.integers(1, N + 1),
    ignored=st.integers(0, N - 1),
    zeta=st.floats(1e-6, 2),
    count=st.integers(1, 50),
)
def test_the_z_loss_is_the_plain_formula(block: int, ignored: int, zeta: float, count: int) -> None:
    """In value and gradient, in fp64, whatever the blocks; its parts are told apart."""
    hidden, weight, targets = problem(torch.float64, ignored=ignored)
    z = OutputZ(zeta)
    ours = chunked_cross_entropy(hidden, weight, targets, count, block, z)
    logits = (hidden @ weight.T)[targets != IGNORE]
    squares = logits.logsumexp(-1).square().sum() / count
    entropy = F.cross_entropy(logits, targets[targets != IGNORE], reduction="sum") / count
    plain = entropy + zeta * squares
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert z.cross_entropy == pytest.approx(entropy.item(), rel=1e-12)
    assert z.square_log_z == pytest.approx(squares.item(), rel=1e-12)
    for mine, theirs in zip(
        gradients(ours, hidden, weight), gradients(plain, hidden, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_the_z_loss_by_hand() -> None:
    """Logits (0, ln 3): ln Z = ln 4 = 1.3862944; gradients p - 1 at the target and 2ζ·ln Z·p."""
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[0.0], [torch.tensor(3.0).log()]], requires_grad=True)
    z = OutputZ(0.5)
    loss = chunked_cross_entropy(hidden, weight, torch.tensor([1]), z=z)
    assert (z.cross_entropy, z.square_log_z) == pytest.approx((0.2876821, 1.9218121), abs=1e-6)
    assert loss.item() == pytest.approx(0.2876821 + 0.5 * 1.9218121, abs=1e-6)
    (grad,) = gradients(loss, weight)
    pulled = 2 * 0.5 * 1.3862944
    assert grad.flatten().tolist() == pytest.approx(
        [0.25 + pulled * 0.25, -0.25 + pulled * 0.75], abs=1e-6
    )
