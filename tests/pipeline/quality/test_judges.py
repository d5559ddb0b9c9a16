"""Judges in process and behind a server: exact means, strict answers, failures set aside."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import httpx
import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.corpus.quality.judge import Judge
from qwen2.inference import Engine
from qwen2.model.decoder import Qwen2
from qwen2.pipeline.quality.judges import EngineJudge, JudgeConfig, open_judge
from qwen2.synthesis import endpoint
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


class Server:
    """Instead of the network: `reply` to each prompt by the times that it was asked."""

    def __init__(self, reply: Callable[[str, int], httpx.Response]) -> None:
        self.reply, self.times, self.bodies = reply, Counter[str](), list[dict[str, Any]]()

    def __call__(self, request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/models"):
            return httpx.Response(200, json={"data": [{"id": "judge"}]})
        assert request.url == "http://there/v1/chat/completions"
        assert request.headers["authorization"] == "Bearer secret"
        self.bodies.append(json.loads(request.content))
        prompt = self.bodies[-1]["messages"][0]["content"]
        self.times[prompt] += 1
        return self.reply(prompt, self.times[prompt])


def judge_at(server: Server, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Judge:
    monkeypatch.setenv("JUDGE_KEY", "secret")
    for name in ("Client", "AsyncClient"):
        client = partial(getattr(httpx, name), transport=httpx.MockTransport(server))
        monkeypatch.setattr(httpx, name, client)
    monkeypatch.setattr(endpoint, "LONGEST_WAIT", 0.001)
    values = {"model": "judge", "endpoint": "http://there/v1", "texts": [{"path": "sample"}]}
    judge, name = open_judge(JudgeConfig.parse(values | {"key_variable": "JUDGE_KEY"} | changes))
    assert name == "http://there/v1 judge"
    return judge


def answer(text: str) -> httpx.Response:
    choice = {"message": {"content": text}, "finish_reason": "stop"}
    return httpx.Response(200, json={"choices": [choice]})


def test_answers_are_read_strictly_and_errors_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def reply(prompt: str, times: int) -> httpx.Response:
        if prompt == "busy" and times < 3:
            return httpx.Response(429 if times == 1 else 503)
        if prompt == "lost" and times == 1:
            raise httpx.ConnectError("gone")
        if prompt == "long":
            return httpx.Response(413, text="too\nlong")
        return answer("I say 4" if prompt == "talks" else "4")

    server = Server(reply)
    judge = judge_at(server, monkeypatch)
    assert dict(judge(["busy", "lost", "talks", "plain", "long"])) == {
        0: 4.0, 1: 4.0, 2: "no digit: 'I say 4'", 3: 4.0, 4: "413: too long",
    }  # fmt: skip
    assert server.times == {"busy": 3, "lost": 2, "talks": 1, "plain": 1, "long": 1}
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in server.bodies} == {
        ("judge", 0, 8)
    }


def test_a_text_that_fails_again_and_again_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = Server(lambda prompt, _: httpx.Response(500) if prompt == "bad" else answer("2"))
    judge = judge_at(server, monkeypatch, attempts=3)
    found = dict(judge(["one", "bad", "two"]))
    assert (found[0], found[2]) == (2.0, 2.0)
    assert str(found[1]).startswith("500: ")
    assert server.times["bad"] == 3


@pytest.mark.parametrize(("status", "attempts"), [(401, 1), (404, 1), (500, 3)])
def test_a_server_that_refuses_us_or_answers_nobody_ends_it(
    monkeypatch: pytest.MonkeyPatch, status: int, attempts: int
) -> None:
    server = Server(lambda prompt, _: httpx.Response(status, text="no\nway"))
    judge = judge_at(server, monkeypatch, attempts=3, at_a_time=1)
    with pytest.raises(UserError, match="no way"):
        list(judge([str(number) for number in range(endpoint.HOPELESS)]))
    assert server.times["0"] == attempts
