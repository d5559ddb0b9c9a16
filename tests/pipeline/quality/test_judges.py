"""Judges in process and behind a server: exact means, strict answers, bounded retries."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.inference import Engine
from qwen2.model.decoder import Qwen2
from qwen2.pipeline.quality.judges import EndpointJudge, EngineJudge, JudgeConfig
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.chatml import ChatTemplate


@torch.inference_mode()
def test_in_process_the_score_is_the_mean_of_the_digits(model: Qwen2, coder: Tokenizer) -> None:
    judge = EngineJudge(Engine(model, coder))
    prompts = [f"How good is this? {i}" for i in range(20)]  # more than one batch
    found = dict(judge(prompts))
    assert sorted(found) == list(range(20))
    digits = torch.tensor([ord(str(digit)) for digit in range(6)])
    for index in (0, 19):
        messages = [{"role": "user", "content": prompts[index]}]
        ids, _ = ChatTemplate.of(coder).encode(coder, messages, add_generation_prompt=True)
        tokens = torch.tensor(ids)
        logits = model(tokens, torch.arange(len(ids)), model.packed([len(ids)]))[-1]
        # Digits beyond the likeliest tokens are left out, but for the likeliest digit.
        seen = set(logits[: coder.vocab_size].topk(50).indices.tolist())
        best = digits[logits[digits].argmax()].item()
        kept = [d for d in digits.tolist() if d in seen or d == best]
        chances = logits[kept].softmax(0)
        expected = sum(int(chr(d)) * float(p) for d, p in zip(kept, chances, strict=True))
        assert found[index] == pytest.approx(expected, abs=1e-4)


def config(tmp_path: Path, **changes: Any) -> JudgeConfig:
    values = {"model": "judge", "endpoint": "http://there/v1", "texts": [{"path": tmp_path}]}
    return JudgeConfig.parse({**values, **changes})


def answer(text: str) -> httpx.Response:
    return httpx.Response(200, json={"choices": [{"message": {"content": text}}]})


def test_answers_are_read_strictly_and_errors_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    times: Counter[str] = Counter()

    def serve(request: httpx.Request) -> httpx.Response:
        assert request.url == "http://there/v1/chat/completions"
        assert request.headers["authorization"] == "Bearer secret"
        body = json.loads(request.content)
        prompt = body["messages"][0]["content"]
        assert (body["model"], body["temperature"]) == ("judge", 0)
        times[prompt] += 1
        if prompt == "busy" and times[prompt] < 3:
            return httpx.Response(429 if times[prompt] == 1 else 503)
        if prompt == "lost" and times[prompt] == 1:
            raise httpx.ConnectError("gone")
        return {"none": httpx.Response(200, json={})}.get(prompt) or answer(
            "I say 4" if prompt == "talks" else "4"
        )

    judge = EndpointJudge(
        config(tmp_path, key_variable="JUDGE_KEY"), httpx.MockTransport(serve), wait=0.001
    )
    found = dict(judge(["busy", "lost", "talks", "plain", "none"]))
    assert found == {0: 4.0, 1: 4.0, 2: None, 3: 4.0, 4: None}
    assert times == {"busy": 3, "lost": 2, "talks": 1, "plain": 1, "none": 1}


@pytest.mark.parametrize(("status", "attempts"), [(401, 1), (404, 1), (500, 3)])
def test_a_server_that_refuses_or_keeps_failing_ends_the_run(
    tmp_path: Path, status: int, attempts: int
) -> None:
    asked: list[httpx.Request] = []

    def serve(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        return httpx.Response(status, text="no\nway")

    judge = EndpointJudge(
        config(tmp_path, attempts=3, at_a_time=1), httpx.MockTransport(serve), wait=0.001
    )
    with pytest.raises(UserError, match=f"status {status}: no way; run again"):
        list(judge(["one"]))
    assert len(asked) == attempts
