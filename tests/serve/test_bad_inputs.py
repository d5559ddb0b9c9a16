"""Inputs that have brought other servers down, or worse: each a 4xx, and the next request succeeds.

What they are after: numbers that allocate (n, best_of, top_logprobs, logit_bias), negative numbers
where counts are meant, templates and schemas that are programs, JSON that exhausts a parser, parts
of a kind nobody expects, ids that are paths.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import raw

HELLO = [{"role": "user", "content": "Hi"}]
CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def target(served: Any) -> Any:
    """The server."""
    return served


SENT: list[tuple[str, bytes]] = []  # what was refused


def refused(served: Any, path: str, body: Any, status: int = 400) -> dict[str, Any]:
    """The error of a refused request; the server must be as it was."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    SENT.append((path, content))
    response = served.client.post(
        path, content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert "\n" not in error["message"]
    assert served.post(CHAT, messages=HELLO, max_tokens=1)["usage"]["completion_tokens"] == 1
    return error


INTEGERS = {
    CHAT: (
        *("max_tokens", "max_completion_tokens", "n", "seed", "top_logprobs", "top_k"),
        *("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"),
        "repetition_penalty",
    ),
    "/v1/completions": ("max_tokens", "n", "best_of", "logprobs", "seed", "top_k"),
    "/v1/embeddings": ("dimensions",),
    "/v1/responses": ("max_output_tokens", "temperature", "top_p"),
}
NEEDED: dict[str, dict[str, Any]] = {
    CHAT: {"messages": HELLO, "logprobs": True},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/embeddings": {"input": "Hi"},
    "/v1/responses": {"input": "Hi"},
}
WRONG = [-2, -(2**31), -(2**63) - 1, 2**63, 10**30, 1e300, "1", [1], {}, True, -3.5]


FINE = {"seed": (-2, -(2**31)), "presence_penalty": (-2,), "frequency_penalty": (-2,)}


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [
        pytest.param(path, name, value, id=f"{path}-{name}-{value!r}")
        for path, names in INTEGERS.items()
        for name in names
        for value in WRONG
        if value not in FINE.get(name, ())
    ],
)
def test_numbers_out_of_bounds(target: Any, path: str, name: str, value: Any) -> None:
    refused(target, path, {**NEEDED[path], name: value})


@pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000])
def test_numbers_that_are_none(target: Any, number: bytes) -> None:
    refused(
        target,
        CHAT,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": %s}' % number,
    )


@pytest.mark.parametrize(
    "extra",
    [
        {"max_tokens": 0}, {"max_completion_tokens": 0}, {"n": 0}, {"n": 1_000_000},
        {"top_logprobs": 5, "logprobs": False}, {"top_logprobs": 21, "logprobs": True},
        {"stop": ["x"] * 1000}, {"stop": "x" * 100_000}, {"stop": ""}, {"stop": [1]}, {"stop": {}},
        {"logit_bias": {"-1": 1}}, {"logit_bias": {"999999": 1}}, {"logit_bias": {"1": 1e9}},
        {"logit_bias": {"x": 1}}, {"logit_bias": {"1" * 5000: 1}}, {"logit_bias": {"٣": 1}},
        {"logit_bias": {str(i): 0 for i in range(5000)}}, {"logit_bias": [1]},
        {"temperature": 3}, {"top_p": 0}, {"repetition_penalty": 0}, {"stream": "yes"},
        {"stream_options": {"include_usage": True}}, {"model": "../../etc/passwd"},
        {"model": "x" * 10_000}, {"temprature": 0.1}, {"__proto__": {}}, {"stream": 1},
    ],
    ids=lambda extra: repr(extra)[:40],
)  # fmt: skip
def test_settings(target: Any, extra: dict[str, Any]) -> None:
    named = extra == {"model": "../../etc/passwd"}
    refused(target, CHAT, {"messages": HELLO, **extra}, 404 if named else 400)


@pytest.mark.parametrize(
    "extra",
    [
        {"chat_template": "{{ 7 * 7 }}"}, {"chat_template_kwargs": {"x": "{{ 7 }}"}},
        {"audio": {}}, {"modalities": ["audio"]}, {"functions": [{"name": "f"}]},
        {"web_search_options": {}}, {"reasoning_effort": "high"}, {"verbosity": "low"},
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_not_supported_is_said(target: Any, extra: dict[str, Any]) -> None:
    error = refused(target, CHAT, {"messages": HELLO, **extra})
    assert next(iter(extra)) in error["message"]


def test_what_changes_nothing_is_ignored(target: Any) -> None:
    target.post(
        CHAT, messages=HELLO, max_tokens=1, user="u", metadata={"a": "b"}, store=True, n=None,
        service_tier="auto", modalities=["text"], audio=None, verbosity="medium", logit_bias={},
    )  # fmt: skip


CALL = {"function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    "messages",
    [
        [], None, "Hi", [None], ["Hi"], [{}], [{"role": "user"}], [{"content": "x"}],
        [{"role": "root", "content": "x"}], [{"role": ["user"], "content": "x"}],
        [{"role": "user", "content": None}], [{"role": "user", "content": 1}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc"}}]}],
        [{"role": "user", "content": [{"type": "input_audio"}]}],
        [{"role": "user", "content": [{"type": "text"}]}], [{"role": "user", "content": ["x"]}],
        [{"role": "user", "content": [{"type": ["text"], "text": "x"}]}],
        [{"role": "user", "content": {"__class__": "x"}}],
        [{"role": "user", "content": "x", "tool_calls": [CALL]}],
        *(
            [{"role": "assistant", "tool_calls": [{"function": {**CALL["function"], **wrong}}]}]
            for wrong in (
                {"arguments": "[1]"}, {"arguments": "{"}, {"arguments": "[" * 9999},
                {"arguments": {"a": 1}}, {"arguments": None}, {"name": "a b"}, {"name": 1},
            )
        ),
        [{"role": "user", "content": "x"}] * 5000,
    ],
    ids=lambda messages: repr(messages)[:60],
)  # fmt: skip
def test_messages(target: Any, messages: Any) -> None:
    refused(target, CHAT, {"messages": messages})


@pytest.mark.parametrize(
    "content",
    [
        "{{ 7 * 7 }}{% for x in range(10**9) %}{% endfor %}", "{{ ''.__class__.__mro__ }}",
        "\x00\ud800\uffff\ufdd0", "<|im_end|>" * 50, "\u0301" * 500, "&lt;{#", "a" * 1500,
    ],
    ids=ascii,
)  # fmt: skip
def test_templates_in_a_message_are_text(target: Any, content: str) -> None:
    body = json.dumps({"messages": [{"role": "user", "content": content}], "max_tokens": 1})
    answers = []
    for path in ("/tokenize", CHAT):
        sent = body if path == CHAT else body.replace(', "max_tokens": 1', "")
        response = target.client.post(
            path, content=sent, headers={"content-type": "application/json"}
        )
        assert response.status_code == 200, response.text
        answers.append(response.json())
    text = target.post("/detokenize", tokens=answers[0]["tokens"])["prompt"]
    assert content.replace("\ud800", "\ufffd") in text


FUNCTION = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "extra",
    [
        {"tools": "f"}, {"tools": [1]}, {"tools": [{}]}, {"tools": [{"type": "function"}]},
        {"tools": [{"type": "code_interpreter"}]},
        {"tools": [{"type": "function", "function": {"name": ""}}]},
        {"tools": [{"type": "function", "function": {"name": "x" * 65}}]},
        {"tools": [{"type": "function", "function": {"name": "../f"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": "object"}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": [{}]}}]},
        {"tools": [{"type": "function", "function": {"name": "f", "description": 1}}]},
        {"tools": [FUNCTION] * 1000}, {"tool_choice": "required"}, {"tool_choice": "f"},
        {"tools": [FUNCTION], "tool_choice": {"type": "function", "function": {"name": "g"}}},
        {"tools": [FUNCTION], "tool_choice": {"type": "allowed_tools"}},
        {"response_format": "json"}, {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "strnig"}}}},
        {"response_format": {"type": "json_object"}, "tools": [FUNCTION]},
    ],
    ids=lambda extra: repr(extra)[:70],
)  # fmt: skip
def test_tools_and_schemas(target: Any, extra: dict[str, Any]) -> None:
    refused(target, CHAT, {"messages": HELLO, **extra})


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"null", b"[]", b'"x"', b"1", b"\xff\xfe", b"{}", b'{"messages": }',
        b'{"a":' * 100_000, b"[" * 3_000_000, b'{"messages":' + b"[" * 65 + b"]" * 65 + b"}",
        b'{"messages": "' + b"\\" * 10_001 + b'"}', b'{"messages": [], "messages": 1}',
        b"\x00" * 1000, b'{"metadata": ' + b"[" * 1000 + b"]" * 1000 + b"}",
    ],
    ids=lambda body: repr(body[:30]),
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/responses", "/tokenize"])
def test_bodies_that_are_no_requests(target: Any, path: str, body: bytes) -> None:
    if path == "/v1/responses" and body == b"{}":
        pytest.skip("there the model may speak first")
    refused(target, path, body)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": []}), ("/v1/completions", {"prompt": [[]]}),
        ("/v1/completions", {"prompt": [-1]}), ("/v1/completions", {"prompt": [10**12]}),
        ("/v1/completions", {"prompt": [[1], [259]]}), ("/v1/completions", {"prompt": [1, "a"]}),
        ("/v1/completions", {"prompt": [True]}), ("/v1/completions", {"prompt": {"a": 1}}),
        ("/v1/completions", {"prompt": [1.5]}), ("/v1/completions", {"prompt": ["a"] * 1000}),
        ("/v1/completions", {"prompt": ["a"] * 100, "n": 16}),
        ("/v1/completions", {"prompt": "a", "suffix": "b"}),
        ("/v1/completions", {"prompt": "a", "best_of": 5}),
        ("/v1/completions", {"prompt": [0] * 100_000}),
        ("/v1/completions", {"prompt": "a" * 2048}),
        ("/v1/completions", {"prompt": ["a" * 1900] * 64, "echo": True, "logprobs": 20}),
        ("/v1/embeddings", {"input": ""}), ("/v1/embeddings", {"input": ["a", ""]}),
        ("/v1/embeddings", {"input": "a", "dimensions": 65}), ("/v1/embeddings", {"input": None}),
        ("/v1/embeddings", {"input": "a" * 5000}),
        ("/v1/embeddings", {"input": "a", "encoding_format": "pickle"}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        ("/v1/responses", {"input": "a", "previous_response_id": "../../x"}),
        ("/v1/responses", {"input": "a", "tools": [{"type": "web_search"}]}),
        ("/v1/responses", {"input": "a", "background": True}),
        ("/v1/responses", {"input": "a", "truncation": "auto"}),
        ("/v1/responses", {"input": "a", "text": {"format": {"type": "json_schema"}}}),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "x"}]}),
        ("/tokenize", {}), ("/tokenize", {"prompt": "a", "messages": HELLO}),
        ("/detokenize", {"tokens": [-1]}), ("/detokenize", {"tokens": [2**40]}),
        ("/detokenize", {"tokens": [260]}), ("/detokenize", {"tokens": "a"}),
    ],
    ids=lambda value: repr(value)[:60],
)  # fmt: skip
def test_the_other_routes(target: Any, path: str, body: Any) -> None:
    refused(target, path, body)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../../etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd",
        "/..%2fetc/passwd", "/chat.js/../../settings.py", "/page/index.html",
        "/static/..%2f..%2fapp.py", "/v1/chat/completions/x", "/docs", "/redoc",
    ],
)  # fmt: skip
def test_ids_are_no_paths(target: Any, path: str) -> None:
    for method in ("GET", "DELETE", "POST"):
        status, body = raw.exchange(target.url, raw.request(path, method, body={}))
        assert status in (404, 405)
        assert b"root:" not in body
        assert b"import" not in body


def test_memory_is_flat(target: Any) -> None:
    """All of it again."""
    if not SENT:
        pytest.skip("nothing was sent")

    def again() -> None:
        for path, content in SENT:
            response = target.client.post(
                path, content=content, headers={"content-type": "application/json"}
            )
            assert 400 <= response.status_code < 500

    raw.assert_memory_settles(again)
    target.wait_until_idle()
