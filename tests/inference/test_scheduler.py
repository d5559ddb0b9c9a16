"""Which tokens share a pass, by hand; what is found in the prefix cache; who is preempted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import BYTES, build

from qwen2.common.errors import UserError
from qwen2.inference import Engine, EngineConfig, Request, SamplingParams, scheduler
from qwen2.inference.config import default_kv_tokens
from qwen2.inference.scheduler import Schedule

MODEL = build()
PARAMS = SamplingParams(max_tokens=8, ignore_eos=True)


def engine(**config: Any) -> Engine:
    values = {"block_size": 4, "kv_tokens": 80, "max_batch_tokens": 10, "max_running": 4}
    return Engine(MODEL, BYTES, EngineConfig(**{**values, **config}))


def shares(batch: Schedule) -> dict[int, int]:
    """Tokens of each request in the pass."""
    return {part.request.id: part.count for part in batch.parts}


def steps(ours: Engine, monkeypatch: pytest.MonkeyPatch) -> list[dict[int, int]]:
    """What every pass consisted of, to the end."""
    log: list[dict[int, int]] = []
    schedule = ours.scheduler.schedule

    def logged() -> Schedule:
        batch = schedule()
        log.append(shares(batch))
        return batch

    monkeypatch.setattr(ours.scheduler, "schedule", logged)
    while ours.step():
        pass
    return log


def submit(ours: Engine, *prompts: list[int], tokens: int = 3) -> list[Request]:
    return [ours.submit(p, PARAMS.model_copy(update={"max_tokens": tokens})) for p in prompts]


def test_decodes_and_pieces_of_prompts_share_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine()
    submit(ours, [1] * 6, [2] * 17, [3] * 2)
    assert steps(ours, monkeypatch) == [
        {0: 6, 1: 4},  # 10 tokens in all
        {0: 1, 1: 9},
        {0: 1, 1: 4, 2: 2},
        {1: 1, 2: 1},
        {1: 1, 2: 1},
    ]


def test_a_batch_is_what_it_says() -> None:
    ours = engine()
    submit(ours, [1] * 3, [2] * 5)
    batch = ours.scheduler.schedule()
    assert batch.tokens == [1] * 3 + [2] * 5
    assert batch.positions == [*range(3), *range(5)]
    assert batch.counts == [3, 5]
    assert batch.rows == [2, 7]
    assert batch.blocks == [[0], [1, 2]]
    assert [table.tolist() for table in batch.tables] == [[0, 1, 2], [4, 5, 6, 7, 8]]


def test_no_prompt_makes_completions_wait_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "BESIDE_DECODES", 5)
    ours = engine(max_batch_tokens=30)
    submit(ours, [1] * 2, tokens=4)
    ours.step()
    submit(ours, [2] * 12, tokens=1)
    assert steps(ours, monkeypatch) == [{0: 1, 1: 5}, {0: 1, 1: 5}, {0: 1, 1: 2}]


def test_the_running_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine(max_running=2)
    submit(ours, [1], [2], [3], tokens=2)
    assert steps(ours, monkeypatch) == [{0: 1, 1: 1}, {0: 1, 1: 1}, {2: 1}, {2: 1}]


def test_a_block_stays_free_for_each_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four blocks of four tokens, 0 and 1 hold one each and will want another."""
    ours = engine(kv_tokens=16, max_running=3)
    submit(ours, [1] * 3, [2] * 3, [3], [4], tokens=4)
    assert steps(ours, monkeypatch) == [{0: 3, 1: 3}] + [{0: 1, 1: 1}] * 3 + [{2: 1, 3: 1}] * 4
    assert ours.stats.preemptions == 0


def test_the_latest_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = engine(kv_tokens=12, prefix_cache=False)  # three blocks
    requests = submit(ours, [1] * 3, [2] * 2, tokens=4)
    assert steps(ours, monkeypatch) == [
        {0: 3, 1: 2},
        {0: 1, 1: 1},
        {0: 1, 1: 1},  # 0 has its second block
        {0: 1},  # 1 finds none, and its own is given back
        {1: 5},  # its prompt and three of output once more
    ]
    assert ours.stats.preemptions == 1
    assert [len(request.output) for request in requests] == [4, 4]


def test_equal_prefixes_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even in the pass that computes them: as the completions of one prompt need it."""
    ours = engine(max_batch_tokens=20, kv_tokens=200)
    requests = submit(ours, [1] * 13, [1] * 13, [1] * 12, [1] * 9 + [2], tokens=1)
    assert steps(ours, monkeypatch) == [{0: 13, 1: 1, 2: 4, 3: 2}]
    assert [request.cached_tokens for request in requests] == [0, 12, 8, 8]
    assert (ours.stats.prefix_hits, ours.stats.prefix_queries) == (28, 48)
    assert ours.stats.prompt_tokens == 48
    assert ours.stats.generated_tokens == 4


def test_a_conversation_finds_its_answers_too() -> None:
    ours = engine()
    (first,) = submit(ours, [1] * 6, tokens=8)
    while ours.step():
        pass
    (second,) = submit(ours, [*first.ids, 5, 6], tokens=1)
    while ours.step():
        pass
    # 6 + 8 tokens, of which the last was never computed: three full blocks.
    assert second.cached_tokens == 12


def test_salts_share_nothing() -> None:
    ours = engine()
    # One is what JSON can bring and no Unicode text can be.
    for salt, expected in (("", 0), ("a", 0), ("\ud800", 0), ("a", 8), ("", 8), ("\ud800", 8)):
        request = ours.submit([1] * 9, PARAMS, salt=salt)
        while ours.step():
            pass
        assert request.cached_tokens == expected


def test_new_weights_use_nothing_old() -> None:
    model = build()
    ours = Engine(model, BYTES, EngineConfig(block_size=4))
    before = ours.generate([[1] * 9], PARAMS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1)
    ours.forget()
    after = ours.generate([[1] * 9], PARAMS)
    assert before != after == Engine(model, BYTES).generate([[1] * 9], PARAMS)
    assert ours.stats.prefix_hits == 0


def test_a_broken_pass_costs_only_its_own_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    ours = engine()
    submit(ours, [1] * 9, tokens=1)
    while ours.step():
        pass
    submit(ours, [1] * 9, [2] * 9, tokens=1)
    with monkeypatch.context() as patched:
        patched.setattr(ours.runner, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            ours.step()
    later = submit(ours, [1] * 9, [2] * 9, tokens=1)
    ours.cancel(ours.scheduler.waiting[1])
    while ours.step():
        pass
    assert [request.cached_tokens for request in later] == [8, 0]


def test_without_a_prefix_cache_nothing_is_found() -> None:
    ours = engine(prefix_cache=False)
    for _ in range(2):
        (request,) = submit(ours, [1] * 9)
        while ours.step():
            pass
        assert request.cached_tokens == 0
    assert ours.stats.prefix_queries == 0


def test_the_default_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 layers of 2 heads of 16 in fp32, keys and values: 512 bytes a token."""
    long = build(max_position_embeddings=10_000)
    for model, free, running, tokens in (
        (MODEL, 10**9, 1, 128),  # the context of 128
        (MODEL, 10**9, 64, 64 * 128),
        (long, 10**9, 1, 10_000),
        (long, 10**9, 64, 64 * 2048),
        (long, 512 * 10_000 * 6, 64, 15_000),  # a quarter of what is free
        (long, 512 * 10_000, 64, 5000),  # half of it, for one sequence
        (long, 0, 64, 2048),
    ):
        monkeypatch.setattr("qwen2.inference.config.free_memory", lambda _, free=free: free)
        assert default_kv_tokens(model, running) == tokens


@pytest.mark.parametrize(
    "bad", [{"max_batch_tokens": 3}, {"block_size": 0}, {"kv_tokens": 0}, {"max_runing": 1}]
)
def test_senseless_configurations_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(UserError, match=next(iter(bad)).removesuffix("_tokens")):
        EngineConfig.parse({"max_running": 4, **bad}, "engine")
