"""Servers that fail, refuse, lie or are not there: no prompt spoils another."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from qwen2.common.errors import UserError
from qwen2.synthesis import Answer, EndpointConfig, EndpointGenerator, Prompt, Sampling
from qwen2.synthesis.endpoint import HOPELESS

KEY = "QWEN2_TEST_KEY"


def prompts(count: int, **sampling: Any) -> list[Prompt]:
    settings = Sampling(**sampling)
    return [
        Prompt(i, ({"role": "user", "content": f"number {i}"},), settings, 100 + i)
        for i in range(count)
    ]


def generator(fake: Any, **changes: Any) -> EndpointGenerator:
    config = {"url": fake.url, "first_wait": 0.01, "key_variable": KEY, **changes}
    return EndpointGenerator(EndpointConfig(**config), "fake")


def answers(fake: Any, count: int = 1, **changes: Any) -> dict[int, Answer]:
    return dict(generator(fake, **changes).generate(prompts(count)))


def good(text: str, **changes: Any) -> tuple[int, dict[str, str], bytes]:
    body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], **changes}
    return 200, {}, json.dumps(body).encode()


def test_what_is_sent_and_what_is_read(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret-key")
    ((index, answer),) = generator(fake).generate(prompts(1, temperature=0.5, top_k=20))
    assert index == 0
    assert answer == Answer("well", "stop", 3, 2, served_by="fake-1/fp")
    assert fake.bodies == [
        {
            "model": "fake", "messages": [{"role": "user", "content": "number 0"}],
            "max_tokens": 1024, "temperature": 0.5, "top_p": 0.8, "top_k": 20, "seed": 100,
        }
    ]  # fmt: skip
    assert fake.headers[0]["authorization"] == "Bearer secret-key"


def test_settings_that_openai_does_not_know_are_sent_only_when_they_say_something(
    fake: Any,
) -> None:
    list(generator(fake).generate(prompts(1)))
    assert not {"top_k", "repetition_penalty"} & fake.bodies[0].keys()
    assert "authorization" not in fake.headers[0]


def test_all_are_answered_and_never_too_many_at_a_time(fake: Any) -> None:
    def slowly(body: dict[str, Any], times: int) -> Any:
        time.sleep(0.02)
        return good(body["messages"][0]["content"].upper())

    fake.reply = slowly
    found = answers(fake, 20, at_a_time=5)
    assert {index: answer.text for index, answer in found.items()} == {
        i: f"NUMBER {i}" for i in range(20)
    }
    assert 2 <= fake.most_at_a_time <= 5


@pytest.mark.parametrize(
    "bad",
    [
        (500, {}, b"oops"),
        (503, {}, b""),
        (429, {"retry-after": "0"}, b"slow down"),
        (200, {}, b"<html>garbage"),
        (200, {}, b"[1, 2]"),
        (200, {}, b'{"choices": []}'),
        (200, {}, b'{"choices": [{"message": {"content": "x"}}]}'),
        None,
    ],
    ids=["500", "503", "429", "html", "array", "no choice", "no reason", "hang-up"],
)
def test_what_may_pass_is_tried_again(fake: Any, bad: Any) -> None:
    fake.reply = lambda body, times: good("at last") if times == 2 else bad
    assert answers(fake)[0].text == "at last"
    assert len(fake.bodies) == 3


def test_a_time_limit_is_for_the_whole_answer(fake: Any) -> None:
    def sleepy(body: dict[str, Any], times: int) -> Any:
        if times == 0:
            time.sleep(1.5)
        return good("awake")

    fake.reply = sleepy
    assert answers(fake, seconds=0.5)[0].text == "awake"
    assert len(fake.bodies) == 2


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_obeyed_by_everybody(fake: Any, form: str) -> None:
    from email.utils import formatdate

    # A date has whole seconds, so it may be up to one second less away.
    value = "2" if form == "seconds" else formatdate(time.time() + 4, usegmt=True)

    def first_refused(body: dict[str, Any], times: int) -> Any:
        if body["messages"][0]["content"] == "number 0":
            return (429, {"retry-after": value}, b"") if times == 0 else good("well")
        time.sleep(0.3)
        return good("well")

    fake.reply = first_refused
    assert len(answers(fake, 4, at_a_time=2)) == 4
    by_number = sorted(zip((b["seed"] for b in fake.bodies), fake.times, strict=True))
    refused = by_number[0][1]
    assert by_number[1][0] == 100  # again
    assert min(when for seed, when in by_number[1:] if seed != 101) - refused > 1.5


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ((400, {}, b'{"error": {"message": "too\\nlong"}}'), "400: too long"),
        ((422, {}, b"what?"), "422: what?"),
        (good("x", choices=[{"message": {"content": None}, "finish_reason": "stop"}]), "without"),
        (
            good("x", choices=[{"message": {"content": "x"}, "finish_reason": "content_filter"}]),
            "content_filter",
        ),
    ],
    ids=["400", "422", "no text", "filtered"],
)
def test_a_refused_prompt_fails_alone_and_at_once(fake: Any, reply: Any, reason: str) -> None:
    def one_refused(body: dict[str, Any], times: int) -> Any:
        return reply if body["messages"][0]["content"] == "number 1" else good("well")

    fake.reply = one_refused
    found = answers(fake, 3)
    assert [found[i].finish_reason for i in range(3)] == ["stop", "failed", "stop"]
    assert reason in (found[1].error or "")
    assert len(fake.bodies) == 3


def test_a_prompt_that_always_breaks_the_server_fails_alone(fake: Any) -> None:
    def one_breaks(body: dict[str, Any], times: int) -> Any:
        poison = body["messages"][0]["content"] == "number 2"
        return (500, {}, b"bug") if poison else good("well")

    fake.reply = one_breaks
    found = answers(fake, 6, attempts=3, at_a_time=2)
    assert sorted(found) == list(range(6))
    assert found[2] == Answer.failure("500: bug")
    assert sum(answer.finish_reason == "stop" for answer in found.values()) == 5


def test_a_server_that_is_gone_ends_the_run_and_loses_no_prompt(fake: Any) -> None:
    fake.reply = lambda body, times: good("well") if len(fake.bodies) <= 4 else (502, {}, b"gone")
    found: list[int] = []

    def collect() -> None:
        for index, _ in generator(fake, attempts=2, at_a_time=1).generate(prompts(100)):
            found.append(index)

    with pytest.raises(UserError, match=f"{HOPELESS} prompts in a row had no answer.*502: gone"):
        collect()
    assert found == [0, 1, 2, 3]  # and none of the others is said to have failed


@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, f"variable {KEY}"), (403, KEY), (404, "ends in /v1.*'fake'")],
)
def test_a_server_that_refuses_us_is_one_clear_line(fake: Any, status: int, hint: str) -> None:
    fake.reply = lambda body, times: (status, {}, b'{"error": {"message": "no"}}')
    with pytest.raises(UserError, match=f"{status}, no; .*{hint}") as caught:
        answers(fake, 5)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_is_told_before_anything_is_asked(fake: Any) -> None:
    with pytest.raises(UserError, match="no model 'fakr', but fake"):
        EndpointGenerator(EndpointConfig(url=fake.url), "fakr")


@pytest.mark.parametrize("url", ["127.0.0.1:80", "ftp://host/v1", "http://"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(UserError, match="write it like http://"):
        EndpointGenerator(EndpointConfig(url=url), "fake")


def test_nobody_there() -> None:
    with pytest.raises(UserError, match="no server answers there"):
        EndpointGenerator(EndpointConfig(url="http://127.0.0.1:1/v1"), "fake")


def test_lone_surrogates_become_something_that_utf8_holds(fake: Any) -> None:
    fake.reply = lambda body, times: (
        200, {}, b'{"choices": [{"message": {"content": "a\\ud800b"}, "finish_reason": "stop"}]}',
    )  # fmt: skip
    assert answers(fake)[0].text == "a\ufffdb"


def test_a_stop_drops_what_is_in_flight_and_reads_no_further(fake: Any) -> None:
    def slow_after_two(body: dict[str, Any], times: int) -> Any:
        if len(fake.bodies) > 2:
            time.sleep(5)
        return good("well")

    fake.reply = slow_after_two
    source = iter(prompts(50))
    began, got = time.monotonic(), []
    for index, _ in generator(fake, at_a_time=2).generate(
        source, lambda: time.monotonic() - began > 1
    ):
        got.append(index)
    assert time.monotonic() - began < 4
    assert len(got) == 2
    assert next(source).index <= 5
