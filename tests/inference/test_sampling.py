"""The sampler: numbers by hand, and the same distribution as transformers' processors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from qwen2.common.errors import UserError
from qwen2.inference.sampling import (
    Sampler,
    SamplingParams,
    adjust,
    bias,
    candidates,
    discourage,
    penalize,
    sample,
)

LOG = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()


def drawn(params: SamplingParams, logits: torch.Tensor = LOG) -> dict[int, float]:
    tokens, probabilities = candidates(logits, params)
    shares = probabilities / probabilities.sum()
    return {int(token): round(float(share), 6) for token, share in zip(tokens, shares, strict=True)}


def test_temperature_by_hand() -> None:
    # Squares at temperature 1/2: 0.01, 0.16, 0.04, 0.09 over 0.30.
    expected = {0: 1 / 30, 1: 16 / 30, 2: 4 / 30, 3: 9 / 30}
    assert drawn(SamplingParams(temperature=0.5)) == {k: round(v, 6) for k, v in expected.items()}


def test_top_k_by_hand() -> None:
    expected = {1: round(4 / 7, 6), 3: round(3 / 7, 6)}
    assert drawn(SamplingParams(temperature=1.0, top_k=2)) == expected


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 3, 2}), (1e-9, {1})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(drawn(SamplingParams(temperature=1.0, top_p=top_p))) == kept


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.24, {0, 1, 2, 3}), (0.26, {1, 2, 3}), (0.76, {1}), (1.0, {1})]
)
def test_min_p_is_a_share_of_the_likeliest(min_p: float, kept: set[int]) -> None:
    assert set(drawn(SamplingParams(temperature=1.0, min_p=min_p))) == kept
    # 0.4 and 0.3 are left by top-p, and 0.3 is less than 0.76 times 0.4
    narrow = drawn(SamplingParams(temperature=1.0, min_p=min_p, top_p=0.5))
    assert set(narrow) == kept & {1, 3}


def test_presence_and_frequency_by_hand() -> None:
    """Token 0 has come twice and token 2 once; only output counts, not the prompt."""
    logits, output = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 2, 0])
    assert discourage(logits, output, 0.5, 0.0).tolist() == [0.5, 2.0, 2.5]
    assert discourage(logits, output, 0.0, 0.25).tolist() == [0.5, 2.0, 2.75]
    assert discourage(logits, output, 0.5, 0.25).tolist() == [0.0, 2.0, 2.25]
    assert discourage(logits, output, -0.5, 0.0).tolist() == [1.5, 2.0, 3.5]
    assert logits.tolist() == [1.0, 2.0, 3.0]


def test_bias_by_hand() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0])
    assert bias(logits, {2: -100, 0: 0.5}).tolist() == [1.5, 2.0, -97.0]
    assert logits.tolist() == [1.0, 2.0, 3.0]


def test_the_order_by_hand() -> None:
    """Bias makes 0 negative, so that the repetition penalty multiplies; then the others take."""
    params = SamplingParams(
        logit_bias={0: -3.0}, repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=0.25
    )
    adjusted = adjust(torch.tensor([1.0, 4.0, 4.0]), torch.tensor([1]), torch.tensor([0]), params)
    assert adjusted.tolist() == [-5.25, 2.0, 4.0]


def test_a_sampler_remembers_what_penalties_need() -> None:
    """Greedy, three equal tokens: each that has come is worth less than those that have not."""
    for values in ({"presence_penalty": 1.0}, {"frequency_penalty": 1.0}):
        sampler = Sampler(SamplingParams(**values), [0, 0])
        tokens = []
        for _ in range(3):
            tokens.append(sampler.draw(torch.zeros(3)))
            sampler.accept(tokens[-1])
        assert sorted(tokens) == [0, 1, 2]
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), [0, 1])  # the prompt counts
    assert sampler.draw(torch.ones(3)) == 2
    sampler.accept(2)
    assert sampler.draw(torch.tensor([1.0, 1.5, 1.0])) == 1


class Only:
    """A grammar that wants these tokens, one after the other."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = list(tokens)

    def mask(self, logits: torch.Tensor) -> torch.Tensor:
        masked = torch.full_like(logits, -torch.inf)
        masked[self.tokens[0]] = logits[self.tokens[0]]
        return masked

    def accept(self, token: int) -> None:
        assert token == self.tokens.pop(0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_has_the_last_word(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, logit_bias={0: -100}, top_k=1, seed=0)
    sampler = Sampler(params, [], Only(0, 2, 1))
    for expected in (0, 2, 1):
        assert sampler.draw(LOG) == expected
        sampler.accept(expected)


def test_nearly_cold_is_greedy() -> None:
    for temperature in (1e-40, 1e-5, 1.1e-4):
        params = SamplingParams(temperature=temperature, seed=1)
        assert Sampler(params, []).draw(1000 * LOG) == 1


def test_the_extremes_of_the_uniform_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zero draws the first token that has a probability, nearly one the last."""
    logits = torch.tensor([-torch.inf, 0.0, 0.0, -torch.inf])
    params = SamplingParams(temperature=1.0)
    for uniform, expected in ((0.0, 1), (0.5, 2), (1 - 2**-53, 2)):
        number = torch.tensor([uniform], dtype=torch.float64)
        monkeypatch.setattr(torch, "rand", lambda *_, number=number, **__: number)
        assert sample(logits, params, torch.Generator()) == expected


def test_repetition_penalty_by_hand() -> None:
    logits = torch.tensor([2.0, -2.0, 1.0])
    assert penalize(logits, torch.tensor([0, 1, 1, 0]), 2.0).tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]


def test_greedy_ignores_the_generator() -> None:
    params = SamplingParams(temperature=0.0, top_k=3, top_p=0.5)
    assert Sampler(params, []).draw(LOG) == 1


@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([5, 40, 3000]),
    temperature=st.floats(0.1, 3.0),
    top_k=st.integers(0, 50),
    top_p=st.floats(0.05, 1.0),
    penalty=st.floats(0.5, 2.0),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3]),
)
@settings(max_examples=150)
def test_the_distribution_is_that_of_transformers(
    seed: int, size: int, temperature: float, top_k: int, top_p: float, penalty: float, min_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(size, generator=generator)
    seen = torch.randint(0, size, (4,), generator=generator).tolist()
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    )
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    if min_p:
        processors.append(MinPLogitsWarper(min_p))
    theirs = processors(torch.tensor([seen]), logits[None].clone())[0].softmax(-1)

    tokens, probabilities = candidates(penalize(logits, torch.tensor(seen), penalty), params)
    ours = torch.zeros(size).index_put((tokens,), probabilities / probabilities.sum())
    # Where sums fall on p within rounding, one token or a tail of tiny ones may be kept or not.
    differing = (ours > 0) ^ (theirs > 0)
    if differing.any():
        common = probabilities[~differing[tokens]]
        assert abs(float(common.sum()) - top_p) < 1e-5
    else:
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_draws_follow_the_probabilities() -> None:
    params = SamplingParams(temperature=1.0, seed=5)
    generator = params.generator()
    draws = torch.tensor([sample(LOG, params, generator) for _ in range(4000)])
    shares = draws.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, LOG.exp(), atol=0.03, rtol=0)


def test_a_seed_draws_the_same_again() -> None:
    def draws(seed: int) -> list[int]:
        params = SamplingParams(temperature=1.0, seed=seed)
        generator = params.generator()
        return [sample(LOG, params, generator) for _ in range(30)]

    assert draws(1) == draws(1) != draws(2)


@pytest.mark.parametrize(
    "bad",
    [
        {"temperature": -1}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}, {"max_tokens": 0},
        {"repetition_penalty": 0}, {"temperature": float("nan")}, {"temprature": 1},
        {"min_p": 1.1}, {"presence_penalty": 2.1}, {"frequency_penalty": float("inf")},
        {"logit_bias": {1: 101}}, {"logit_bias": {1: float("nan")}}, {"logprobs": -1},
        {"prompt_logprobs": 10**6}, {"seed": 2**64}, {"grammar": {"kind": "xml", "text": ""}},
    ],
)  # fmt: skip
def test_senseless_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(bad))):
        SamplingParams.parse(bad, "sampling")
