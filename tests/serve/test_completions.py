"""Completions, embeddings, responses, models and tokens."""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import pytest
import tiny_models
import torch

from qwen2.serve.logprobs import CompletionLogprobs


def greedy(served: Any, prompt: list[int], count: int) -> str:
    ids = tiny_models.full_pass_greedy(served.engine.model, prompt, count)
    return tiny_models.BYTES.decode(ids)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("ab", [[97, 98]]),
        (["ab", "c"], [[97, 98], [99]]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
        ("", [[256]]),
        ("a<|im_end|>", [[97, 258]]),
    ],
)
def test_prompts_in_every_form(served: Any, prompt: Any, ids: list[list[int]]) -> None:
    answer = served.post("/v1/completions", prompt=prompt, max_tokens=5, temperature=0)
    assert answer["object"] == "text_completion"
    assert [c["index"] for c in answer["choices"]] == list(range(len(ids)))
    assert [c["text"] for c in answer["choices"]] == [greedy(served, each, 5) for each in ids]
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] == 5 * len(ids)


def test_n_and_the_order_of_choices(served: Any) -> None:
    settings: dict[str, Any] = {"max_tokens": 12, "temperature": 1.5, "seed": 3}
    both = served.post("/v1/completions", prompt=["ab", "cd"], n=2, best_of=2, **settings)
    texts = [choice["text"] for choice in both["choices"]]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    for prompt, own in (("ab", texts[:2]), ("cd", texts[2:])):
        alone = served.post("/v1/completions", prompt=prompt, n=2, **settings)
        assert [choice["text"] for choice in alone["choices"]] == own
        assert own[0] != own[1]
    assert both["usage"]["prompt_tokens"] == 4


def test_sixteen_tokens_where_nothing_is_said(served: Any) -> None:
    answer = served.post("/v1/completions", prompt="a", ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16


def test_echo_with_logprobs_is_what_one_pass_says(served: Any) -> None:
    prompt = "héllo"
    answer = served.post(
        "/v1/completions", prompt=prompt, max_tokens=1, temperature=0, echo=True, logprobs=2
    )
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    ids = [*prompt.encode()]
    rows = tiny_models.full_pass_logits(served.engine.model, ids).log_softmax(-1)
    last = int(rows[-1, : tiny_models.BYTES.vocab_size].argmax())
    expected = [float(rows[i, id_]) for i, id_ in enumerate([*ids[1:], last])]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert choice["text"].startswith(prompt)
    assert logprobs["tokens"][:4] == ["h", "bytes:\\xc3", "bytes:\\xa9", "l"]
    assert logprobs["text_offset"][:5] == [0, 1, 1, 2, 3]
    assert len(logprobs["text_offset"]) == len(ids) + 1
    for token, value, top in list(zip(*list(logprobs.values())[:3], strict=True))[1:]:
        assert top[token] == value
        assert 2 <= len(top) <= 3
        assert max(top.values()) >= value


def test_a_stream_says_the_same(served: Any) -> None:
    settings: dict[str, Any] = {
        "prompt": ["ab", "cé"], "max_tokens": 9, "temperature": 0, "echo": True, "logprobs": 1,
    }  # fmt: skip
    whole = served.post("/v1/completions", **settings)["choices"]
    with served.client.stream("POST", "/v1/completions", json={**settings, "stream": True}) as got:
        lines = [line.removeprefix("data: ") for line in got.iter_lines() if line]
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    for index, choice in enumerate(whole):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert "".join(chunk["text"] for chunk in own) == choice["text"]
        assert own[-1]["finish_reason"] == choice["finish_reason"]
        for name, values in choice["logprobs"].items():
            streamed = [value for chunk in own for value in chunk["logprobs"][name]]
            if name in ("tokens", "text_offset"):
                assert streamed == values


def test_offsets_by_hand() -> None:
    logprobs = CompletionLogprobs(tiny_models.BYTES)
    for byte in "aé€b".encode():
        logprobs.add(byte, None)
    assert logprobs.take()["text_offset"] == [0, 1, 1, 2, 2, 2, 3]


def test_embeddings(served: Any) -> None:
    answer = served.post("/v1/embeddings", input=["one text", "another"])
    assert [each["index"] for each in answer["data"]] == [0, 1]
    assert answer["usage"] == {"prompt_tokens": 15, "total_tokens": 15}
    model = served.engine.model
    ids = torch.tensor([*b"another"])
    with torch.inference_mode():
        hidden = model.model(ids, torch.arange(7), model.packed([7]))[-1]
    expected = torch.nn.functional.normalize(hidden, dim=0)
    assert answer["data"][1]["embedding"] == pytest.approx(expected.tolist(), abs=1e-4)
    short = served.post("/v1/embeddings", input="another", dimensions=8)["data"][0]["embedding"]
    assert short == pytest.approx((expected[:8] / expected[:8].norm()).tolist(), abs=1e-4)
    packed = served.post("/v1/embeddings", input="another", encoding_format="base64")
    data = base64.b64decode(packed["data"][0]["embedding"])
    assert struct.unpack("<64f", data) == pytest.approx(expected.tolist(), abs=1e-4)
    tokens = served.post("/v1/embeddings", input=[*b"another"])
    assert tokens["data"][0]["embedding"] == pytest.approx(expected.tolist(), abs=1e-4)


def test_responses(served: Any) -> None:
    settings: dict[str, Any] = {"max_output_tokens": 6, "temperature": 0}
    answer = served.post("/v1/responses", input="Hi", instructions="Be brief.", **settings)
    assert (answer["status"], answer["store"]) == ("incomplete", False)
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    chat = served.post("/v1/chat/completions", messages=messages, max_tokens=6, temperature=0)
    text = answer["output"][0]["content"][0]["text"]
    assert text == chat["choices"][0]["message"]["content"]
    assert answer["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert answer["usage"]["output_tokens"] == 6
    parts = [{"role": "user", "content": [{"type": "input_text", "text": "Hi"}]}]
    same = served.post("/v1/responses", input=parts, instructions="Be brief.", **settings)
    assert same["output"][0]["content"][0]["text"] == text
    count = served.post("/v1/responses/input_tokens", input="Hi", instructions="Be brief.")
    assert count["input_tokens"] == answer["usage"]["input_tokens"]


def test_responses_as_a_stream(served: Any) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0)
    made = list(client.responses.create(input="Hi", max_output_tokens=5, stream=True))
    kinds = [each.type.removeprefix("response.") for each in made]
    assert kinds[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert kinds[-4:] == ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert [each.sequence_number for each in made] == list(range(len(made)))
    deltas = "".join(e.delta for e in made if e.type == "response.output_text.delta")
    assert made[-1].response.output_text == deltas


def test_models(serve: Any) -> None:
    with serve(names=("org/one", "two")) as served:
        listed = served.client.get("/v1/models").json()
        assert [model["id"] for model in listed["data"]] == ["org/one", "two"]
        assert listed["data"][0]["max_model_len"] == 2048
        assert served.client.get("/v1/models/org/one").json()["id"] == "org/one"
        for path in ("/v1/models/three", "/v1/models/../../etc/passwd", "/v1/models/%2e%2e"):
            response = served.client.get(path)
            assert response.status_code == 404
        answer = served.post("/v1/completions", prompt="a", model="two", max_tokens=1)
        assert answer["model"] == "two"
        body = {"prompt": "a", "model": "gpt-6-astra"}
        error = served.client.post("/v1/completions", json=body).json()["error"]
        assert error["code"] == "model_not_found"
        assert "'org/one', 'two'" in error["message"]
        forgotten = served.client.post("/completions", json={"prompt": "a"})  # the /v1
        assert forgotten.status_code == 404
        assert "the API is at /v1" in forgotten.json()["error"]["message"]


def test_tokenize_and_back(served: Any) -> None:
    answer = served.post("/tokenize", prompt="aé<|im_end|>", return_token_strs=True)
    assert answer == {
        "tokens": [97, 195, 169, 258],
        "count": 4,
        "max_model_len": 2048,
        "token_strs": ["a", "bytes:\\xc3", "bytes:\\xa9", "<|im_end|>"],
    }
    assert served.post("/detokenize", tokens=answer["tokens"]) == {"prompt": "aé<|im_end|>"}
    plain = served.post("/tokenize", prompt="<|im_end|>", add_special_tokens=False)
    assert plain["count"] == 10


def test_metrics(serve: Any) -> None:
    with serve() as served:
        for _ in range(2):
            served.post("/v1/completions", prompt="a" * 100, max_tokens=3, ignore_eos=True)
        served.client.post("/v1/completions", json={})
        text = served.client.get("/metrics").text
    lines = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    tiny = '{model_name="tiny"}'
    assert lines[f"qwen2:prompt_tokens_total{tiny}"] == "200.0"
    assert lines[f"qwen2:generation_tokens_total{tiny}"] == "6.0"
    assert lines[f"qwen2:prefix_cache_hits_total{tiny}"] == "96.0"
    assert lines[f"qwen2:num_requests_running{tiny}"] == "0.0"
    assert lines[f"qwen2:time_to_first_token_seconds_count{tiny}"] == "2.0"
    assert lines[f"qwen2:inter_token_latency_seconds_count{tiny}"] == "4.0"
    ended = 'qwen2:request_success_total{finished_reason="length",model_name="tiny"}'
    assert lines[ended] == "2.0"
    bad = 'qwen2:http_requests_total{route="/v1/completions",status="400"}'
    assert lines[bad] == "1.0"
