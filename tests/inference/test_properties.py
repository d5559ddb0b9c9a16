"""Whatever requests, cancellations, preemptions and interruptions come: the same answers, no leak.

What is expected of each request is what an engine without a prefix cache makes of it alone; that
such an engine equals passes without any cache is tested for every kind of model.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tiny_models import BYTES, build, full_pass_greedy

from qwen2.inference import Engine, EngineConfig, Request, SamplingParams
from qwen2.model.config import DualChunk, Mixture, SlidingWindow, Yarn
from qwen2.model.decoder import Qwen2

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "tied": {"tie_word_embeddings": True},
    "mixture": {
        "moe": Mixture(
            num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
            shared_expert_intermediate_size=32,
        ),
    },
    "yarn": {
        "max_position_embeddings": 32,
        "yarn": Yarn(factor=4.0, original_max_position_embeddings=32),
    },
    "dual chunk": {
        "dual_chunk": DualChunk(chunk_size=24, local_size=7, original_max_position_embeddings=24)
    },
    "sliding": {"sliding": SlidingWindow(size=9, layers=(1,))},
}  # fmt: skip

GENERATOR = torch.Generator().manual_seed(3)
LONG = torch.randint(0, 256, (60,), generator=GENERATOR).tolist()
PROMPTS = [LONG[:45], [*LONG[:45], 1, 2], [*LONG[:20], 7], [9], LONG[30:], LONG[:45]]
TOKENS = 25


@cache
def of_kind(kind: str) -> tuple[Qwen2, list[list[int]]]:
    """A model, and its greedy answers to `PROMPTS` by passes without a cache."""
    model = build(**KINDS[kind])
    return model, [full_pass_greedy(model, prompt, TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", KINDS)
@given(
    batch=st.integers(1, 80), running=st.integers(1, 6), block=st.integers(1, 20),
    cache_=st.booleans(), blocks=st.integers(0, 12),
)  # fmt: skip
@settings(max_examples=12)
def test_every_kind_of_model_equals_full_passes(
    kind: str, batch: int, running: int, block: int, cache_: bool, blocks: int
) -> None:
    """Any size of chunks, blocks and batch; a pool so small that requests are preempted."""
    model, expected = of_kind(kind)
    config = EngineConfig(
        max_batch_tokens=batch, max_running=min(running, batch), block_size=block,
        prefix_cache=cache_, kv_tokens=47 + TOKENS + blocks * block,
    )  # fmt: skip
    engine = Engine(model, BYTES, config)
    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    completions = engine.generate(PROMPTS, params)
    assert [completion.token_ids for completion in completions] == expected
    assert engine.stats.kv_used == 0


def small(**config: Any) -> Engine:
    """An engine with 10 blocks of 4 tokens: two or three requests fill it."""
    return Engine(
        of_kind("dense")[0],
        BYTES,
        EngineConfig(**{"block_size": 4, "kv_tokens": 40, "max_queue": 1000, **config}),
    )


def test_preemption_changes_nothing() -> None:
    chosen = [
        SamplingParams(max_tokens=20, ignore_eos=True, **values)
        for values in (
            {},
            {"temperature": 1.0, "seed": 5, "repetition_penalty": 1.2, "logprobs": 2},
            {"temperature": 0.8, "seed": 6, "top_p": 0.9, "frequency_penalty": 0.5},
            {"presence_penalty": 1.0, "logprobs": 0},
        )
    ]
    prompts = [[number] * 7 for number in range(4)]
    engine = small()
    together = engine.generate(prompts, chosen)
    assert engine.stats.preemptions > 0
    assert engine.stats.kv_used == 0
    for prompt, params, completion in zip(prompts, chosen, together, strict=True):
        (alone,) = small().generate([prompt], params)
        assert alone.token_ids == completion.token_ids
        for one, other in zip(alone.logprobs, completion.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]


@cache
def alone(prompt: tuple[int, ...], params: str) -> list[int]:
    """The ids of one request that nothing disturbs."""
    engine = Engine(of_kind("dense")[0], BYTES, EngineConfig(prefix_cache=False))
    return engine.generate([prompt], SamplingParams.model_validate_json(params))[0].token_ids


prompts = st.builds(
    lambda common, own: LONG[:common] + own,
    st.sampled_from([0, 4, 7, 12]),
    st.lists(st.integers(0, 1), min_size=1, max_size=3),
)
parameters = st.builds(
    SamplingParams,
    max_tokens=st.sampled_from([1, 5, 17]),
    temperature=st.sampled_from([0.0, 1.0]),
    seed=st.just(7),
    ignore_eos=st.just(True),
    frequency_penalty=st.sampled_from([0.0, 1.0]),
)


class Machine(RuleBasedStateMachine):
    """An engine with little room, and everything that can be done to it."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = small(max_batch_tokens=11, max_running=5, kv_tokens=32)
        self.requests: list[Request] = []
        self.outputs: dict[int, list[int]] = {}
        self.cancelled: set[int] = set()

    @rule(
        several=st.lists(st.tuples(prompts, parameters), min_size=1, max_size=3),
        salt=st.sampled_from(["", "", "a"]),
    )
    def submit(self, several: list[tuple[list[int], SamplingParams]], salt: str) -> None:
        for prompt, params in several:
            ids: list[int] = []
            request = self.engine.submit(
                prompt,
                params,
                salt=salt,
                on_output=lambda output, ids=ids: ids.extend(output.token_ids),
            )
            self.requests.append(request)
            self.outputs[request.id] = ids

    @rule(steps=st.integers(1, 8))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            work = self.engine.step()
            assert work == self.engine.has_work

    @rule(right=st.integers(0, 4), wrong=st.lists(st.integers(0, 255), max_size=3))
    def guess(self, right: int, wrong: list[int]) -> None:
        """A draft of what will come, and of what hardly will, for the next step to verify."""
        for request in self.engine.scheduler.running:
            if len(request.ids) - request.computed == 1:
                known = len(request.output)
                coming = alone(tuple(request.prompt), request.params.model_dump_json())
                request.draft = coming[known : known + right] + wrong
        self.engine.step()

    @precondition(lambda self: self.engine.has_work)
    @rule(kind=st.sampled_from(["cancel", "interrupt", "interrupt late", "forget"]), data=st.data())
    def disturb(self, kind: str, data: st.DataObject) -> None:
        if kind == "cancel":
            request = data.draw(st.sampled_from(self.requests))
            if request.finish_reason is None:
                self.cancelled.add(request.id)
            self.engine.cancel(request)
        elif kind == "forget":
            self.engine.forget()
        else:
            self.interrupt(late=kind == "interrupt late")

    def interrupt(self, late: bool) -> None:
        """A pass that breaks off, before or after it has written to the cache."""
        run = self.engine.runner.run

        def broken(batch: Any) -> Any:
            if late:
                run(batch)
            raise KeyboardInterrupt

        self.engine.runner.run = broken  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            self.engine.step()
        self.engine.runner.run = run  # type: ignore[method-assign]

    @invariant()
    def blocks_are_held_by_the_running_alone(self) -> None:
        scheduler = self.engine.scheduler
        pool = scheduler.pool
        holders = [0] * pool.size
        for request in scheduler.running:
            assert request.computed <= len(request.ids) <= len(request.table) + 1
            for block in request.blocks:
                holders[block] += 1
        assert holders == pool._holders
        assert pool.held == sum(count > 0 for count in holders)
        for request in scheduler.waiting:
            assert not request.blocks
            assert request.computed == 0
        arrivals = [request.id for request in [*scheduler.running, *scheduler.waiting]]
        assert arrivals == sorted(arrivals)

    def teardown(self) -> None:
        steps = 0
        while self.engine.step():
            steps += 1
            assert steps < 2000, "it does not come to an end"
        assert self.engine.stats.kv_used == 0
        for request in self.requests:
            expected = alone(tuple(request.prompt), request.params.model_dump_json())
            assert self.outputs[request.id] == request.output
            if request.id in self.cancelled:
                assert request.finish_reason == "cancelled"
                assert request.output == expected[: len(request.output)]
            else:
                assert request.finish_reason == "length"
                assert request.output == expected


TestEngine = Machine.TestCase
TestEngine.settings = settings(max_examples=50, stateful_step_count=30)
