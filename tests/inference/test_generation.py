"""Generation: equal to transformers', independent of the batch, and right at its ends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.inference import Completion, SamplingParams, Sequence, generate, step, stream
from qwen2.inference.generation import CachedTokens
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hf_config import config_to_hf
from qwen2.tokenizer import Tokenizer

BYTES = Tokenizer.from_ranks(
    {bytes([value]): value for value in range(256)},
    {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
)
CONFIG = ModelConfig(
    vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip


def build() -> Qwen2:
    generator = torch.Generator().manual_seed(0)
    model = Qwen2(CONFIG).eval()
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4).add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


MODEL = build()
PROMPTS = [list(b"one"), list(b"a longer prompt than the others"), list(b"!")]


def params(**values: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 20, **values})


def test_greedy_equals_transformers() -> None:
    other = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(**config_to_hf(CONFIG, "float32"))
    )
    other.load_state_dict(MODEL.state_dict())
    for prompt in PROMPTS:
        theirs = other.eval().generate(
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=[256, 258],
            pad_token_id=256, suppress_tokens=list(range(259, 264)),
        )  # fmt: skip
        (ours,) = generate(MODEL, BYTES, [prompt], params())
        assert ours.token_ids == theirs[0, len(prompt) :].tolist()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_batch_gives_what_each_gives_alone(seed: int) -> None:
    for chosen in (params(), params(temperature=1.0, top_p=0.95, seed=seed, ignore_eos=True)):
        together = generate(MODEL, BYTES, PROMPTS, chosen)
        alone = [generate(MODEL, BYTES, [prompt], chosen)[0] for prompt in PROMPTS]
        assert [c.token_ids for c in together] == [c.token_ids for c in alone]
        assert [c.prompt_token_ids for c in together] == PROMPTS


def test_seeds_differ_and_repeat() -> None:
    def text(seed: int) -> list[int]:
        return generate(MODEL, BYTES, PROMPTS[:1], params(temperature=1.5, seed=seed))[0].token_ids

    assert text(1) == text(1) != text(2)


def test_the_stream_is_the_text() -> None:
    sequence = Sequence(MODEL, BYTES, PROMPTS[0], params(temperature=1.0, seed=3))
    pieces = list(stream(MODEL, sequence))
    completion = Completion.of(sequence)
    assert "".join(pieces) == completion.text
    assert completion.usage == {
        "prompt_tokens": 3,
        "completion_tokens": len(completion.token_ids),
        "total_tokens": 3 + len(completion.token_ids),
    }


def forced(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Make the model's next tokens known."""
    queue = iter(ids)
    monkeypatch.setattr("qwen2.inference.generation.sample", lambda *_: next(queue))


@pytest.mark.parametrize(
    ("ids", "stop", "text", "reason", "used"),
    [
        (list(b"abcdef"), (), "abcdef", "length", 6),
        ([*b"ab", 256, *b"cdef"], (), "ab", "stop", 3),
        ([*b"ab", 258, *b"cdef"], (), "ab", "stop", 3),
        (list(b"abcdef"), ("cd",), "ab", "stop", 4),
        (list(b"abcdef"), ("fg",), "abcdef", "length", 6),
        ([*b"abcd", *"é".encode()], (), "abcdé", "length", 6),
        ([*b"abcde", "é".encode()[0]], (), "abcde\ufffd", "length", 6),
    ],
)
def test_where_an_answer_ends(
    monkeypatch: pytest.MonkeyPatch, ids: list[int], stop: tuple[str, ...], text: str,
    reason: str, used: int,
) -> None:  # fmt: skip
    forced(monkeypatch, ids)
    (completion,) = generate(MODEL, BYTES, [[1]], params(max_tokens=6, stop=stop))
    assert (completion.text, completion.finish_reason) == (text, reason)
    assert completion.token_ids == ids[:used]


def test_ignore_eos_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    forced(monkeypatch, [256, *b"ab"])
    (completion,) = generate(MODEL, BYTES, [[1]], params(max_tokens=3, ignore_eos=True))
    assert completion.token_ids == [256, *b"ab"]


def test_generation_ends_with_the_context() -> None:
    prompt = [5] * 120
    (completion,) = generate(MODEL, BYTES, [prompt], params(max_tokens=50, ignore_eos=True))
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 8


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "empty"), ([5] * 128, "128 tokens and the model's context 128"), ([259], "259")],
)
def test_prompts_that_cannot_be(prompt: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sequence(MODEL, BYTES, prompt, params())


@pytest.mark.parametrize("chunk", [1, 4, 1000])
def test_prefill_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    expected = generate(MODEL, BYTES, PROMPTS, params())
    monkeypatch.setattr("qwen2.inference.generation.PREFILL_CHUNK", chunk)
    assert generate(MODEL, BYTES, PROMPTS, params()) == expected


@given(
    turns=st.lists(
        st.tuples(st.lists(st.integers(0, 255), min_size=1, max_size=10), st.integers(1, 6)),
        min_size=1,
        max_size=4,
    ),
    forget=st.integers(0, 10),
)
@settings(max_examples=25, deadline=None)
def test_a_conversation_with_a_cache_equals_one_without(
    turns: list[tuple[list[int], int]], forget: int
) -> None:
    """Each turn repeats what was said, or some of it, and adds something."""
    cached = CachedTokens(MODEL)
    said: list[int] = []
    for added, count in turns:
        prompt = said[: max(0, len(said) - forget)] + added
        if len(prompt) + count >= CONFIG.max_position_embeddings:
            break
        sequence = Sequence(MODEL, BYTES, prompt, params(max_tokens=count), cached)
        for _ in stream(MODEL, sequence):
            pass
        assert generate(MODEL, BYTES, [prompt], params(max_tokens=count)) == [
            Completion.of(sequence)
        ]
        said = prompt + sequence.output


def test_an_interrupted_pass_leaves_the_cache_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    cached = CachedTokens(MODEL)
    sequence = Sequence(MODEL, BYTES, PROMPTS[1], params(), cached)
    step(MODEL, [sequence])

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("qwen2.model.cache.CachedAttention.advance", interrupt)
        with pytest.raises(KeyboardInterrupt):
            step(MODEL, [sequence])
    prompt = PROMPTS[1] + sequence.output + list(b" and more")
    after = Sequence(MODEL, BYTES, prompt, params(), cached)
    for _ in stream(MODEL, after):
        pass
    assert generate(MODEL, BYTES, [prompt], params()) == [Completion.of(after)]
