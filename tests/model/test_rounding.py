"""Rounding by search and by what the inputs are; torch's 4-bit kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qwen2.model.calibrate import calibration_documents, calibration_windows
from qwen2.model.config import Mixture, ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.int4pack import fits_torch, int4_linear_by_torch, pack_int4_for_torch
from qwen2.model.packing import dequantise_int4, round_int4
from qwen2.model.quantise import quantise_model
from qwen2.model.rounding import compensate_int4, fit_groups, inverse_factor, search_int4
from qwen2.tokenizer import Tokenizer


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error(weight: Tensor, parts: tuple[Tensor, ...], product: Tensor) -> float:
    """tr(D H Dᵀ), D the error of the weight: what it does to outputs."""
    difference = weight - dequantise_int4(*parts)
    return float(((difference @ product) * difference).sum())


def inputs(count: int, width: int) -> Tensor:
    """x (count, width) whose columns go together, some far larger than others."""
    mixed = normal(count, width // 4) @ normal(width // 4, width, seed=1)
    return (mixed + 0.3 * normal(count, width, seed=2)) * normal(width, seed=3).exp()


def test_a_search_finds_the_grid_that_numbers_lie_on() -> None:
    """q · 0.25 - 1.75, where no group has the numbers 0, 1, 13, 14 and 15."""
    q = torch.randint(2, 13, (40, 64), generator=torch.Generator().manual_seed(0))
    q[:, ::32], q[:, 1::32] = 2, 12
    weight = q * 0.25 - 1.75
    assert torch.equal(dequantise_int4(*search_int4(weight)), weight)


def test_a_search_is_never_worse_than_ends() -> None:
    weight = normal(64, 256) ** 3
    unit = torch.eye(256)
    plain, searched = round_int4(weight), search_int4(weight)
    assert error(weight, searched, unit) < 0.9 * error(weight, plain, unit)


def test_importance_decides() -> None:
    """An outlier that does not matter may be wrong, so that others are right."""
    groups = torch.cat([normal(50, 31), torch.full((50, 1), 20.0)], dim=1)[:, None]
    importance = torch.ones(32)
    importance[-1] = 1e-6
    scale, minimum = fit_groups(groups, importance)
    numbers = ((groups - minimum[..., None]) / scale[..., None]).round().clamp(0, 15)
    wrong = numbers * scale[..., None] + minimum[..., None] - groups
    assert wrong[..., :-1].abs().mean() < 0.3  # steps of 22/15 give 0.37
    assert wrong[..., -1].abs().mean() > 4


@pytest.mark.parametrize("width", [64, 192])
def test_compensation_beats_rounding_alone(width: int) -> None:
    x, weight = inputs(500, width), normal(48, width, seed=2)
    product = x.t() @ x
    compensated = error(weight, compensate_int4(weight, inverse_factor(product)), product)
    assert compensated < 0.5 * error(weight, search_int4(weight), product)


def test_compensation_without_inputs_is_the_search() -> None:
    """An expert that saw no token: nothing to mend, all columns alike."""
    weight = normal(8, 64)
    parts = compensate_int4(weight, inverse_factor(torch.zeros(64, 64)))
    unit = torch.eye(64)
    assert error(weight, parts, unit) <= 1.001 * error(weight, search_int4(weight), unit)


def test_the_factor_is_that_of_the_inverse() -> None:
    x = inputs(100, 64)
    product = x.t() @ x
    upper = inverse_factor(product)
    damped = product + 0.01 * product.diagonal().mean() * torch.eye(64)
    torch.testing.assert_close(upper.t() @ upper @ damped, torch.eye(64), atol=0.02, rtol=0)
    assert torch.equal(upper, upper.triu())


@pytest.mark.parametrize("routed", [False, True])
def test_a_calibrated_model_loses_less(tiny: ModelConfig, routed: bool) -> None:
    """Over the text that it was calibrated on, in every kind of layer."""
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    if routed:
        sizes["moe"] = Mixture(
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=64,
            shared_expert_intermediate_size=64,
        )
    config = tiny.model_copy(update=sizes)
    model = Qwen2(config)
    init_weights(model, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, 40, (12, 64), generator=generator)  # few tokens: alike inputs

    @torch.no_grad()
    def outputs(of: Qwen2) -> Tensor:
        return torch.cat([of.model(w, torch.arange(64), of.packed([64])) for w in windows])

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    true = outputs(model)
    plain = (outputs(quantise_model(model, "int4")) - true).norm()
    calibrated = (outputs(quantise_model(model, "int4", windows.tolist())) - true).norm()
    assert calibrated < 0.8 * plain
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_calibration_leaves_int8_as_it_is(
    tiny: ModelConfig, random_model: Callable[..., Qwen2]
) -> None:
    model = random_model(tiny)
    one, other = quantise_model(model, "int8"), quantise_model(model, "int8", [[1, 2, 3]])
    true = one.state_dict()
    assert all(torch.equal(t, true[name]) for name, t in other.state_dict().items())


def test_calibration_text(tokenizer: Tokenizer) -> None:
    documents = calibration_documents(10)
    assert {document.kind for document in documents} >= {"code", "docstrings"}
    windows = calibration_windows(tokenizer, 10)
    assert len(windows) == len(documents) <= 10
    assert all(len(window) == 512 for window in windows)
    assert all(window[0] == tokenizer.end_of_text_id for window in windows)
    assert windows == calibration_windows(tokenizer, 10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_kernel_equals_the_reference(dtype: torch.dtype) -> None:
    """Beside activations, which it does not round, and scales, which it rounds to `dtype`."""
    parts, bias = search_int4(normal(48, 192)), normal(48, seed=1)
    x = normal(5, 192, seed=2).to(dtype)
    packed, scales = pack_int4_for_torch(*parts, dtype)
    assert packed.nbytes == parts[0].nbytes
    expected = x.float() @ dequantise_int4(*parts).t() + bias
    found = int4_linear_by_torch(x, packed, scales, bias.to(dtype))
    assert found.dtype == dtype
    atol = 1e-4 if dtype == torch.float32 else 0.15
    torch.testing.assert_close(found.float(), expected, atol=atol, rtol=0.01)


def test_rows_that_torchs_kernel_takes() -> None:
    assert fits_torch(4864)
    assert not fits_torch(24)
