"""Logprobs: by hand, and through the engine those of one pass over prompt and output."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tiny_models import BYTES, build, full_pass_logits

from qwen2.inference import Engine, EngineConfig, SamplingParams, TokenLogprob, scheduler
from qwen2.inference.logprobs import token_logprobs

MODEL = build()
PROMPT = list(b"It was the best of times")


def test_by_hand() -> None:
    logits = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]).log() + 7
    first, second = token_logprobs(logits, [2, 0], 2, 3)
    assert first.token == 2
    assert first.logprob == pytest.approx(math.log(0.2), abs=1e-6)
    assert [token for token, _ in first.top] == [1, 2]  # 3 is beyond the vocabulary of 3
    assert [p for _, p in first.top] == pytest.approx([math.log(0.4), math.log(0.2)], abs=1e-6)
    assert second.logprob == pytest.approx(math.log(0.25), abs=1e-6)
    assert token_logprobs(logits, [2, 0], 0, 3)[0].top == ()
    assert len(token_logprobs(logits, [2, 0], 100, 3)[0].top) == 3


def expected(ids: list[int], top: int) -> list[TokenLogprob]:
    """Of ids[1:], by one pass; over all rows of the head, as in training."""
    logprobs = full_pass_logits(MODEL, ids).log_softmax(-1)
    result = []
    for row, token in zip(logprobs, ids[1:], strict=False):
        best = row[: BYTES.vocab_size].argsort(descending=True)[:top].tolist()
        tops = tuple((each, float(row[each])) for each in best)
        result.append(TokenLogprob(token, float(row[token]), tops))
    return result


def same(ours: list[Any], theirs: list[TokenLogprob]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.token == other.token
        assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
        assert [token for token, _ in mine.top] == [token for token, _ in other.top]
        assert [p for _, p in mine.top] == pytest.approx([p for _, p in other.top], abs=1e-4)


@pytest.mark.parametrize("rows", [1, 5, 7, 1000])
@pytest.mark.parametrize("batch", [4, 10, 1000])
def test_prompt_and_output(monkeypatch: pytest.MonkeyPatch, rows: int, batch: int) -> None:
    """Penalties and temperature change what is drawn, but not what is reported."""
    monkeypatch.setattr(scheduler, "SCORED_ROWS", rows)
    engine = Engine(MODEL, BYTES, EngineConfig(max_batch_tokens=batch, max_running=3))
    params = SamplingParams(
        max_tokens=6, temperature=0.7, seed=3, frequency_penalty=1.0, logit_bias={5: 3.0},
        ignore_eos=True, logprobs=3, prompt_logprobs=2,
    )  # fmt: skip
    plain = SamplingParams(max_tokens=4, ignore_eos=True)
    engine.generate([PROMPT], plain)  # it is in the prefix cache, and is computed nevertheless
    requests = [engine.submit(PROMPT, each) for each in (plain, params, params)]
    run = engine.runner.run

    def counted(batch: Any) -> torch.Tensor:
        assert len(batch.rows) <= rows + len(requests)
        return run(batch)

    monkeypatch.setattr(engine.runner, "run", counted)
    while engine.step():
        assert requests[1].cached_tokens == 0
    for request in requests[1:]:
        assert request.prompt_logprobs is not None
        assert request.prompt_logprobs[0] is None
        same(request.prompt_logprobs[1:], expected(PROMPT, 2))
        same(request.logprobs, expected(request.ids, 3)[len(PROMPT) - 1 :])
    assert requests[0].prompt_logprobs is None
    assert requests[0].logprobs == []


def test_across_preemption() -> None:
    config = EngineConfig(block_size=4, kv_tokens=44, max_batch_tokens=7, max_running=3)
    engine = Engine(MODEL, BYTES, config)
    params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1, prompt_logprobs=1)
    prompts = [PROMPT[:9], PROMPT[3:15], PROMPT[5:11]]
    completions = engine.generate(prompts, params)
    assert engine.stats.preemptions > 0
    for prompt, completion in zip(prompts, completions, strict=True):
        assert completion.prompt_logprobs is not None
        whole = expected(prompt + completion.token_ids, 1)
        same(completion.prompt_logprobs[1:] + completion.logprobs, whole)


def test_a_prompt_of_one_token_has_none() -> None:
    (completion,) = Engine(MODEL, BYTES).generate(
        [[5]], SamplingParams(max_tokens=1, prompt_logprobs=0)
    )
    assert completion.prompt_logprobs == [None]


def test_the_stream_has_them_too() -> None:
    params = SamplingParams(max_tokens=5, logprobs=1, ignore_eos=True)
    engine = Engine(MODEL, BYTES)
    outputs = list(engine.stream(PROMPT, params))
    (completion,) = engine.generate([PROMPT], params)
    streamed = [each for output in outputs for each in output.logprobs]
    assert [each.token for each in streamed] == completion.token_ids
    same(streamed, completion.logprobs)
