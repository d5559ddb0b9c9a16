"""Guesses change nothing but the number of passes: any source, any settings, any batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_properties import Machine as EngineMachine
from tiny_models import BYTES, build, full_pass_greedy

import qwen2
from qwen2.common.errors import UserError
from qwen2.inference import Completion, Engine, EngineConfig, Request, SamplingParams
from qwen2.inference.draft import DraftModel
from qwen2.inference.speculate import LARGE, Pace, PromptLookup, Speculator, continuation
from qwen2.model.decoder import Qwen2

MODEL = build()
DRAFTS: dict[str, Qwen2 | None] = {
    "prompt lookup": None,
    "the model itself": MODEL,
    "of more rows": build(vocab_size=300),
    "of fewer rows": build(vocab_size=259, num_hidden_layers=1),
    "of another kind": build(hidden_size=32, num_attention_heads=2, num_key_value_heads=1),
}
LONG = list(b"the cat sat on the mat; the cat sat on the hat; the cat")


def engine(draft: str = "prompt lookup", **config: Any) -> Engine:
    return Engine(MODEL, BYTES, EngineConfig(**{"speculate": 4, **config}), draft=DRAFTS[draft])


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 24, "ignore_eos": True, **values})


class Stub:
    """A source of guesses that are known."""

    def __init__(self, guess: Any) -> None:
        self.guess, self.asked = guess, list[list[int]]()

    def propose(self, wanted: Sequence[tuple[Request, int]]) -> list[list[int]]:
        self.asked.append([count for _, count in wanted])
        return [self.guess(request, count) for request, count in wanted]

    def forget(self) -> None:
        pass


def with_stub(guess: Any, **config: Any) -> tuple[Engine, Stub]:
    ours, stub = engine(**config), Stub(guess)
    ours.speculator = Speculator(stub, ours.config.speculate, ours.config.max_batch_tokens)
    return ours, stub


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        (b"abcd", 3, b""),
        (b"a", 3, b""),
        (b"xaya", 3, b""),  # one token alone is no reason
        (b"abXYZab", 3, b"XYZ"),
        (b"abXYZab", 2, b"XY"),
        (b"abXabYab", 2, b"Ya"),  # the latest of equal length
        (b"cabXabYcab", 2, b"Xa"),  # a longer one goes before a later one
        (b"1abcd2 2abcd3 abcd", 1, b"3"),  # no more than four tokens are looked at
        (b"1abcd2 2abcd3 1abcd", 1, b"3"),
        (b"abab", 5, b"ababa"),  # the repetition goes on
        (b"aaa", 4, b"aaaa"),
        (b"aa", 4, b""),
    ],
)
def test_continuations_by_hand(text: bytes, count: int, expected: bytes) -> None:
    assert continuation(np.frombuffer(text, np.uint8).astype(np.int32), count) == list(expected)


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.integers(1, 6))
def test_continuations_by_search(ids: list[int], count: int) -> None:
    expected: list[int] = []
    for n in (4, 3, 2):
        ends = [end for end in range(n, len(ids)) if ids[end - n : end] == ids[-n:]]
        if ends and n <= len(ids):
            text = list(ids)
            for place in range(count):
                text.append(text[ends[-1] + place])
            expected = text[len(ids) :]
            break
    assert continuation(np.array(ids, np.int32), count) == expected


def test_prompt_lookup_follows_a_growing_text() -> None:
    request = engine(speculate=0).submit(LONG, params())
    source = PromptLookup()
    for _ in range(300):
        expected = continuation(np.array(request.ids, np.int32), 4)
        assert source.propose([(request, 4)]) == [expected]
        request.ids += expected or [7]


def test_the_pace_by_hand() -> None:
    pace = Pace(8, 8)
    pace.learn(8, 2, 10)
    assert (pace.size, pace.misses) == (3, 0)
    pace.learn(3, 3, 14)
    assert pace.size == 6
    pace.learn(6, 6, 21)
    assert pace.size == 8
    for misses, output, until in [(1, 22, 0), (2, 23, 0), (3, 24, 32), (4, 33, 49), (5, 50, 82)]:
        pace.learn(pace.size, 0, output)
        assert (pace.size, pace.misses, pace.rest_until) == (1, misses, until)
    for output in (100, 300):
        pace.learn(1, 0, output)
    pace.learn(1, 0, 600)
    assert pace.rest_until == 728
    pace.learn(1, 1, 730)
    assert (pace.size, pace.misses) == (2, 0)


chosen = st.builds(
    params,
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.0]),
    seed=st.integers(0, 3),
    top_p=st.sampled_from([1.0, 0.9]),
    repetition_penalty=st.sampled_from([1.0, 1.2, 0.8]),
    frequency_penalty=st.sampled_from([0.0, -0.5, 0.5]),
    logprobs=st.sampled_from([None, 0, 2]),
    stop=st.sampled_from([(), ("a",), ("zz", " t")]),
    max_tokens=st.integers(1, 24),
    ignore_eos=st.booleans(),
    grammar=st.sampled_from([None, None, {"kind": "regex", "text": "(ab|ac){1,9}[xyz]{3,6}"}]),
)
prompts = st.builds(
    lambda end, own: LONG[:end] + own,
    st.integers(0, len(LONG)),
    st.lists(st.integers(0, 255), min_size=1, max_size=3),
)


@cache
def plain(prompt: tuple[int, ...], params: str) -> Completion:
    ours = Engine(MODEL, BYTES, EngineConfig(prefix_cache=False))
    return ours.generate([prompt], SamplingParams.model_validate_json(params))[0]


def same(one: Completion, other: Completion) -> None:
    """Equal but for rounding in the logprobs."""
    assert one.token_ids == other.token_ids
    assert (one.text, one.finish_reason, one.stop_reason) == (
        other.text, other.finish_reason, other.stop_reason,
    )  # fmt: skip
    assert len(one.logprobs) == len(other.logprobs)
    for left, right in zip(one.logprobs, other.logprobs, strict=True):
        assert left.token == right.token
        assert left.logprob == pytest.approx(right.logprob, abs=1e-4)
        assert [token for token, _ in left.top] == [token for token, _ in right.top]


@pytest.mark.parametrize("draft", DRAFTS)
@given(
    requests=st.lists(st.tuples(prompts, chosen), min_size=1, max_size=5),
    most=st.integers(1, 9), block=st.integers(1, 9), batch=st.integers(8, 60),
    spare=st.integers(0, 12),
)  # fmt: skip
@settings(max_examples=25)
def test_output_equals_that_without_guesses(
    draft: str, requests: list[tuple[list[int], SamplingParams]], most: int, block: int,
    batch: int, spare: int,
) -> None:  # fmt: skip
    """Greedy and drawn, by id; in a pool so small that some are preempted."""
    ours = engine(
        draft, speculate=most, block_size=block, max_batch_tokens=batch, max_running=8,
        kv_tokens=84 + spare * block,
    )  # fmt: skip
    completions = ours.generate([prompt for prompt, _ in requests], [p for _, p in requests])
    for (prompt, own), completion in zip(requests, completions, strict=True):
        assert completion.error is None
        same(completion, plain(tuple(prompt), own.model_dump_json()))
    assert ours.stats.kv_used == 0
    assert 0 <= ours.stats.spec_accepted <= ours.stats.spec_proposed


@pytest.mark.parametrize(("right", "temperature"), [(True, 0.0), (False, 0.0), (False, 1.0)])
def test_a_source_that_is_always_or_never_right(right: bool, temperature: float) -> None:
    own = params(max_tokens=21, temperature=temperature, seed=1)
    expected = plain(tuple(LONG), own.model_dump_json()).token_ids

    def guess(request: Request, count: int) -> list[int]:
        coming = expected[len(request.output) :][:count]
        return coming if right else [(token + 1) % 256 for token in coming]

    ours, stub = with_stub(guess)
    (completion,) = ours.generate([LONG], own)
    assert completion.token_ids == expected
    if right:
        # The prompt's pass draws 1; then 4 + 1 at a time.
        assert stub.asked == [[4]] * 4
        assert (ours.stats.spec_proposed, ours.stats.spec_accepted) == (16, 16)
    else:
        # 4, 1, 1 guesses at outputs 1, 2, 3; a rest from 4 to 12; one at 12; a rest to 29.
        assert stub.asked == [[4], [1], [1], [1]]
        assert (ours.stats.spec_proposed, ours.stats.spec_accepted) == (7, 0)
    assert ours.stats.generated_tokens == 21


def test_figures_of_a_draft_that_is_the_model_itself() -> None:
    ours = engine("the model itself", speculate=3)
    ours.generate([LONG], params(max_tokens=10))  # 1, then 4, 4, and 1 that needs no guess
    assert (ours.stats.spec_proposed, ours.stats.spec_accepted) == (6, 6)


def test_an_end_among_the_guesses() -> None:
    """Text, stop string and end of sequence; what is guessed beyond does not come."""
    expected = plain(tuple(LONG), params().model_dump_json())
    end = expected.token_ids[7]
    first = expected.token_ids.index(end)
    model = build(eos_token_id=end)
    ours = Engine(model, BYTES, EngineConfig(speculate=6), draft=model)
    completion, stopped = ours.generate(
        [LONG] * 2,
        [params(ignore_eos=False), params(stop=(expected.text[3:5],))],
    )
    assert completion.token_ids == expected.token_ids[: first + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", end)
    assert stopped.finish_reason == "stop"
    assert expected.text.startswith(stopped.text + expected.text[3:5])
    assert ours.stats.kv_used == 0


def test_forced_text_of_a_grammar_can_be_guessed() -> None:
    own = params(grammar={"kind": "regex", "text": "(abcdef){3}"}, temperature=1.0, seed=2)
    ours = engine()
    (completion,) = ours.generate([[1]], own)
    assert completion.text == "abcdef" * 3
    assert ours.stats.spec_accepted >= 8


def test_many_requests_get_no_guesses() -> None:
    def anything(_: Request, count: int) -> list[int]:
        return [1] * count

    ours, stub = with_stub(anything, speculate=9)
    ours.generate([[number] for number in range(LARGE + 1)], params(max_tokens=4))
    assert stub.asked == []
    ours.generate([[number] for number in range(LARGE)], params(max_tokens=4))
    assert stub.asked[0] == [2] * LARGE  # as many as their room has; and 3 each would fit
    ours, stub = with_stub(anything, speculate=9, max_batch_tokens=6, max_running=4)
    ours.generate([[1], [2], [3]], params(max_tokens=8))
    assert stub.asked[0] == [1, 1, 1]


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    with pytest.raises(UserError, match="258 tokens and the tokenizer 259"):
        Engine(MODEL, BYTES, EngineConfig(speculate=2), draft=build(vocab_size=258))
    with pytest.raises(UserError, match="speculate"):
        Engine(MODEL, BYTES, draft=MODEL)


def test_guesses_are_ids_of_the_tokenizer() -> None:
    """Also where the draft's likeliest row is none."""
    draft = build(vocab_size=300)
    draft.lm_head.weight.data[259:] *= 100
    source = DraftModel(draft, 259, 200, 16, 100)
    request = engine(speculate=0).submit(LONG, params())
    (guesses,) = source.propose([(request, 20)])
    assert guesses == full_pass_greedy(draft, LONG, 20)
    assert max(guesses) < 259


def request_of(ids: list[int]) -> Request:
    return engine(speculate=0).submit(ids, params())


@given(st.data())
@settings(max_examples=40)
def test_the_drafts_cache_is_as_if_there_were_none(data: st.DataObject) -> None:
    """Whatever was right of its guesses, whoever lost its place, however small the passes."""
    draft = DRAFTS["of fewer rows"]
    assert draft is not None
    block = data.draw(st.integers(1, 7))
    room = data.draw(st.integers(20, 90))
    source = DraftModel(draft, 259, room, block, data.draw(st.integers(1, 30)))
    requests = [request_of(LONG[: 3 + 7 * number]) for number in range(3)]
    for _ in range(data.draw(st.integers(1, 6))):
        some = data.draw(st.lists(st.sampled_from(requests), unique=True, min_size=1))
        wanted = [(request, data.draw(st.integers(1, 5))) for request in some]
        # Each may hold room for five guesses that it had before.
        needed = sum(-(-(len(request.ids) + 5) // block) for request in some)
        for (request, count), guesses in zip(wanted, source.propose(wanted), strict=True):
            if guesses:
                assert guesses == full_pass_greedy(draft, request.ids, count)
            else:
                assert needed > source.pool.size
            kept = data.draw(st.integers(0, len(guesses)))
            request.ids += [*guesses[:kept], data.draw(st.integers(0, 255))]
        if data.draw(st.booleans()):
            source.forget()
        held = sum(len(place.blocks) for place in source.places.values())
        assert held == source.pool.held
    for request in requests:
        request.finish_reason = "stop"
    assert source.propose([]) == []
    assert source.pool.held == 0


def test_a_draft_goes_no_further_than_its_context() -> None:
    draft = build(max_position_embeddings=60)
    ours = Engine(MODEL, BYTES, EngineConfig(speculate=4), draft=draft)
    (completion,) = ours.generate([LONG], params(max_tokens=40))
    same(completion, plain(tuple(LONG), params(max_tokens=40).model_dump_json()))
    source = DraftModel(draft, 259, 200, 16, 100)
    assert [len(*source.propose([(request_of([1] * n), 4)])) for n in (57, 59, 60, 61)] == [
        4, 2, 1, 0,
    ]  # fmt: skip


@pytest.mark.parametrize("where", ["target", "draft"])
def test_a_broken_pass_leaves_the_engine_usable(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ours = engine("of fewer rows")
    assert ours.speculator is not None
    proposer = ours.speculator.proposer
    assert isinstance(proposer, DraftModel)
    request = ours.submit(LONG, params())
    for _ in range(3):
        ours.step()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ours.runner if where == "target" else proposer.runner, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ours.step()
    assert proposer.pool.held == 0
    while ours.step():
        pass
    same(Completion.of(request), plain(tuple(LONG), params().model_dump_json()))
    assert ours.stats.kv_used == 0


class Machine(EngineMachine):
    """Whatever else happens to an engine (see there), while it guesses with a draft model."""

    def __init__(self) -> None:
        super().__init__()
        config = EngineConfig(
            block_size=4, kv_tokens=32, max_batch_tokens=11, max_running=5, max_queue=1000,
            speculate=3,
        )  # fmt: skip
        self.engine = Engine(MODEL, BYTES, config, draft=DRAFTS["of fewer rows"])


TestEngine = Machine.TestCase
TestEngine.settings = settings(max_examples=30, stateful_step_count=30)


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_says_the_same(real_checkpoint: Path) -> None:
    """A text with repetitions; greedy, and drawn with a seed, alone and side by side."""
    model, tokenizer = qwen2.load(real_checkpoint, dtype="fp32")
    text = "def add(first, second):\n    return first + second\n\n\ndef subtract(first, second):\n"
    chosen = [params(max_tokens=40), params(max_tokens=40, temperature=0.8, seed=4)]
    plain = Engine(model, tokenizer).generate([text] * 2, chosen)
    for draft in (None, model):
        guessing = Engine(model, tokenizer, EngineConfig(speculate=5), draft=draft)
        for one, other in zip(guessing.generate([text] * 2, chosen), plain, strict=True):
            same(one, other)
        assert guessing.stats.spec_accepted > 10
