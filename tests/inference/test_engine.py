"""The engine: equal to transformers and to passes without a cache, whatever shares the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import BYTES, build, full_pass_greedy

from qwen2.common.errors import UserError
from qwen2.inference import (
    Completion,
    Engine,
    EngineConfig,
    Output,
    QueueFull,
    Request,
    SamplingParams,
)
from qwen2.inference.sampling import Sampler
from qwen2.model.hf_config import config_to_hf

MODEL = build()
PROMPTS = [list(b"one"), list(b"a longer prompt than the others"), list(b"!")]


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, **values})


def engine(**config: Any) -> Engine:
    return Engine(MODEL, BYTES, EngineConfig(**config))


def run(prompts: list[list[int]], chosen: SamplingParams, **config: Any) -> list[Completion]:
    return engine(**config).generate(prompts, chosen)


def test_greedy_equals_transformers() -> None:
    other = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**config_to_hf(MODEL.config, "float32"))
    )
    other.load_state_dict(MODEL.state_dict())
    for prompt in PROMPTS:
        theirs = other.eval().generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=[256, 258],
            pad_token_id=256, suppress_tokens=list(range(259, 264)),
        )  # fmt: skip
        (ours,) = run([prompt], params())
        assert ours.token_ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_gives_what_each_gives_alone(seed: int) -> None:
    for chosen in (params(), params(temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True)):
        together = run(PROMPTS, chosen)
        alone = [run([prompt], chosen)[0] for prompt in PROMPTS]
        assert together == alone
        assert [c.prompt_token_ids for c in together] == PROMPTS


def test_seeds_differ_and_repeat() -> None:
    def ids(seed: int | None) -> list[int]:
        return run(PROMPTS[:1], params(temperature=1.5, seed=seed))[0].token_ids

    assert ids(1) == ids(1) != ids(2)
    assert ids(None) != ids(None)


def test_prompts_of_text_and_parameters_of_their_own() -> None:
    texts = ["one", ""]
    chosen = [params(max_tokens=3, ignore_eos=True), params(max_tokens=5, ignore_eos=True)]
    first, second = engine().generate(texts, chosen)
    assert first.prompt_token_ids == list(b"one")
    assert second.prompt_token_ids == [BYTES.end_of_text_id]
    assert (len(first.token_ids), len(second.token_ids)) == (3, 5)


def test_the_stream_is_the_text() -> None:
    chosen = params(temperature=1.0, seed=3)
    ours = engine()
    outputs = list(ours.stream(PROMPTS[0], chosen))
    (completion,) = ours.generate(PROMPTS[:1], chosen)
    assert "".join(output.text for output in outputs) == completion.text
    assert [t for output in outputs for t in output.token_ids] == completion.token_ids
    assert [output.finish_reason for output in outputs[:-1]] == [None] * (len(outputs) - 1)
    assert outputs[-1].finish_reason == completion.finish_reason
    assert completion.usage == {
        "prompt_tokens": 3,
        "completion_tokens": len(completion.token_ids),
        "total_tokens": 3 + len(completion.token_ids),
    }


def forced(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> dict[str, Any]:
    """Make the model's next tokens known; to be drawn with the parameters returned."""
    queue = iter(ids)
    monkeypatch.setattr(Sampler, "draw", lambda *_: next(queue))
    return {"temperature": 1.0}


@pytest.mark.parametrize(
    ("ids", "stop", "text", "reason", "which", "used"),
    [
        (list(b"abcdef"), (), "abcdef", "length", None, 6),
        ([*b"ab", 256, *b"cdef"], (), "ab", "stop", 256, 3),
        ([*b"ab", 258, *b"cdef"], (), "ab", "stop", 258, 3),
        (list(b"abcdef"), ("x", "cd"), "ab", "stop", "cd", 4),
        (list(b"abcdef"), ("fg",), "abcdef", "length", None, 6),
        ([*b"abcd", *"é".encode()], (), "abcdé", "length", None, 6),
        ([*b"abcde", "é".encode()[0]], (), "abcde\ufffd", "length", None, 6),
    ],
)
def test_where_an_answer_ends(
    monkeypatch: pytest.MonkeyPatch, ids: list[int], stop: tuple[str, ...], text: str,
    reason: str, which: str | int | None, used: int,
) -> None:  # fmt: skip
    chosen = params(max_tokens=6, stop=stop, **forced(monkeypatch, ids))
    (completion,) = run([[1]], chosen)
    assert (completion.text, completion.finish_reason) == (text, reason)
    assert completion.stop_reason == which
    assert completion.token_ids == ids[:used]


def test_ignore_eos_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = params(max_tokens=3, ignore_eos=True, **forced(monkeypatch, [256, *b"ab"]))
    assert run([[1]], chosen)[0].token_ids == [256, *b"ab"]


def test_generation_ends_with_the_context() -> None:
    (completion,) = run([[5] * 120], params(max_tokens=50, ignore_eos=True))
    assert completion.finish_reason == "length"
    assert completion.token_ids == full_pass_greedy(MODEL, [5] * 120, 8)


@pytest.mark.parametrize(
    ("prompt", "values", "message"),
    [
        ([], {}, "empty"),
        ([5] * 128, {}, "128 tokens and the model's context 128"),
        ([259], {}, "259"),
        ([-1], {}, "259"),
        ([2**70], {}, "integers"),
        ([1.0], {}, "integers"),
        (["a"], {}, "integers"),
        ([5] * 90, {"max_tokens": 8}, "the cache holds 96; lower max_tokens or raise kv_tokens"),
        ([5] * 97, {"max_tokens": 1}, "the cache holds 96"),
        ([5], {"logit_bias": {259: 1.0}}, "logit_bias"),
        ([5], {"grammar": {"kind": "regex", "text": "("}}, "grammar"),
    ],
)
def test_what_cannot_be_is_refused_and_harms_nothing(
    prompt: list[Any], values: dict[str, Any], message: str
) -> None:
    ours = engine(kv_tokens=96)
    with pytest.raises(UserError, match=message):
        ours.submit(prompt, params(**values))
    with pytest.raises(UserError, match=message):
        ours.generate([PROMPTS[0], prompt], params(**values))
    assert not ours.has_work
    assert ours.generate(PROMPTS, params()) == run(PROMPTS, params())


def test_the_whole_of_the_cache_can_be_used() -> None:
    chosen = params(max_tokens=17, ignore_eos=True)
    (completion,) = run([[5] * 80], chosen, kv_tokens=96)
    assert completion.token_ids == full_pass_greedy(MODEL, [5] * 80, 17)


def test_the_queue_is_bounded() -> None:
    ours = engine(max_queue=2)
    for _ in range(2):
        ours.submit(PROMPTS[0], params())
    with pytest.raises(QueueFull, match="2 requests wait"):
        ours.submit(PROMPTS[0], params())
    ours.step()
    ours.submit(PROMPTS[0], params())
    assert len(ours.generate(PROMPTS * 2, params())) == 6  # its own prompts are not strangers'


def test_cancelled_requests_leave_nothing() -> None:
    ours = engine()
    outputs: list[Output] = []
    requests = [
        ours.submit(prompt, params(ignore_eos=True), on_output=outputs.append) for prompt in PROMPTS
    ]
    ours.cancel(requests[0])  # while it waits
    ours.step()
    ours.step()
    ours.cancel(requests[1])  # while it runs
    ours.cancel(requests[1])
    while ours.step():
        pass
    assert [r.finish_reason for r in requests] == ["cancelled", "cancelled", "length"]
    assert [len(r.output) for r in requests] == [0, 2, 20]
    assert sum(output.finish_reason == "cancelled" for output in outputs) == 2
    assert ours.stats.kv_used == 0


def test_a_callback_that_fails_ends_its_own_request_only() -> None:
    def broken(_: Output) -> None:
        raise RuntimeError("nobody listens")

    ours = engine()
    lost = ours.submit(PROMPTS[0], params(), on_output=broken)
    assert ours.generate(PROMPTS, params()) == run(PROMPTS, params())
    assert lost.finish_reason == "cancelled"
    assert ours.stats.kv_used == 0


def test_a_model_that_breaks_down_ends_the_request_with_an_error() -> None:
    broken = build()
    with torch.no_grad():
        broken.model.embed_tokens.weight[7] = float("nan")
    ours = Engine(broken, BYTES)
    healthy, ill = ours.generate([list(b"one"), [7, 8]], params())
    assert ill.finish_reason == "error"
    assert ill.error == "the model's logits are not finite numbers"
    assert healthy.token_ids == run([list(b"one")], params())[0].token_ids


@pytest.mark.parametrize("where", ["run", "postprocess"])
def test_a_broken_pass_leaves_the_engine_usable(
    monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    ours = engine()
    request: Request = ours.submit(PROMPTS[1], params())
    for _ in range(3):
        ours.step()
    with monkeypatch.context() as patched:
        patched.setattr(ours.runner if where == "run" else ours, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            ours.generate([PROMPTS[1] + list(b" and more"), PROMPTS[2]], params())
    assert ours.stats.waiting == 1  # those of the call are cancelled, the other goes on
    while ours.step():
        pass
    expected = run([PROMPTS[1], PROMPTS[1] + list(b" and more")], params())
    assert Completion.of(request) == expected[0]
    assert ours.generate([PROMPTS[1] + list(b" and more")], params()) == expected[1:]
    assert ours.stats.kv_used == 0


def test_whoever_ends_in_a_broken_pass_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise MemoryError

    ours = engine()
    outputs: list[Output] = []
    for count in (1, 2):
        ours.submit(PROMPTS[0], params(max_tokens=count, logprobs=0), on_output=outputs.append)
    with monkeypatch.context() as patched:
        patched.setattr("qwen2.inference.engine.token_logprobs", broken)
        with pytest.raises(MemoryError):
            ours.step()
    assert [output.finish_reason for output in outputs] == ["length"]
    assert ours.stats.waiting == 1
    ours.end_all("error", "MemoryError")
    assert [output.finish_reason for output in outputs] == ["length", "error"]
    assert ours.stats.kv_used == 0


def test_an_abandoned_stream_ends_its_request() -> None:
    ours = engine()
    outputs = ours.stream(PROMPTS[0], params(ignore_eos=True))
    next(outputs)
    outputs.close()
    assert not ours.has_work
    assert ours.stats.kv_used == 0


def test_embeddings_are_final_hidden_states() -> None:
    ours = engine()
    requests = [ours.submit(prompt, params(), embed=True) for prompt in PROMPTS]
    whole = ours.submit([5] * 128, params(), embed=True)  # the whole context
    beside = ours.submit(PROMPTS[0], params())
    while ours.step():
        pass
    for request in [*requests, whole]:
        tokens = torch.tensor(request.prompt)
        with torch.no_grad():
            hidden = MODEL.model(tokens, torch.arange(len(tokens)), MODEL.packed([len(tokens)]))
        assert request.embedding is not None
        torch.testing.assert_close(request.embedding, hidden[-1], atol=1e-5, rtol=1e-5)
        assert (request.finish_reason, request.output) == ("stop", [])
    assert Completion.of(beside) == run(PROMPTS[:1], params())[0]
