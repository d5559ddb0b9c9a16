"""Grammars: what comes out follows them, and none of them harms the engine."""

from __future__ import annotations

import gc
import json
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import BYTES, build, full_pass_logits

import qwen2
from qwen2.common.errors import UserError
from qwen2.inference import (
    Completion,
    Engine,
    EngineConfig,
    EngineThread,
    QueueFull,
    SamplingParams,
    grammar,
    grammar_check,
)
from qwen2.inference.sampling import ConstraintError
from qwen2.tokenizer.chatml import ChatTemplate

pytest.importorskip("llguidance")

MODEL = build()
ENGINE = Engine(MODEL, BYTES)
PROMPT = list(b"answer")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b\n", "é", 7, None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: list[Any] = [
    PERSON,
    {"type": "boolean"},
    {"enum": ["red", "green", 3, {"a": [1, 2]}]},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^[a-c]{2,4}$"}]},
    {"type": "string", "format": "date"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "prefixItems": [{"const": 1}, {"type": "boolean"}], "maxItems": 2},
    {"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer", "minimum": -3, "maximum": 3}}},
]
REGEXES = [
    "a{3}", "(ab|cd){1,4}", "[0-9]{1,3}(\\.[0-9]{2})?", "yes|no", "\\d{4}-\\d\\d", "[^a-z]{2,5}",
    "(é|ü){1,3}!", "[\u4e00-\u9fff]{2}",
]  # fmt: skip
LARK = 'start: "<" word ("," word)* ">"\nword: /[a-z]{1,3}/ | NUMBER\nNUMBER: /[0-9]{1,2}/'


def params(kind: str, text: Any, **values: Any) -> SamplingParams:
    text = text if isinstance(text, str) else json.dumps(text)
    grammar = {"kind": kind, "text": text}
    return SamplingParams(
        **{"max_tokens": 100, "temperature": 1.0, "seed": 0, "grammar": grammar, **values}
    )


def complete(*chosen: SamplingParams, **config: Any) -> list[Completion]:
    engine = Engine(MODEL, BYTES, EngineConfig(**config)) if config else ENGINE
    return engine.generate([PROMPT] * len(chosen), chosen)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_json_fits_its_schema(schema: Any) -> None:
    validator = pytest.importorskip("jsonschema_rs").Draft202012Validator(
        schema, validate_formats=True
    )
    many = [
        params("json_schema", schema, seed=seed, temperature=1.0 + 4 * (seed % 2))
        for seed in range(12)
    ]
    many += [params("json_schema", schema, temperature=0, max_tokens=120)]
    texts = set()
    for completion in complete(*many):
        assert completion.error is None
        if completion.finish_reason == "stop":  # else it ran out of tokens
            validator.validate(json.loads(completion.text))
            texts.add(completion.text)
        assert max(completion.token_ids) < BYTES.vocab_size
    assert len(texts) >= 2


@pytest.mark.parametrize("regex", REGEXES)
def test_text_matches_its_regex(regex: str) -> None:
    many = [params("regex", regex, seed=seed, top_p=0.99) for seed in range(6)]
    many += [params("regex", regex, temperature=0), params("regex", regex, ignore_eos=True)]
    for completion in complete(*many):
        assert completion.finish_reason == "stop"
        assert re.fullmatch(regex, completion.text), completion.text
        assert completion.stop_reason in (None, 256, 258)


def test_lark() -> None:
    for completion in complete(*(params("lark", LARK, seed=seed) for seed in range(6))):
        assert re.fullmatch(r"<([a-z]{1,3}|\d\d?)(,([a-z]{1,3}|\d\d?))*>", completion.text)
        assert completion.finish_reason == "stop"
        assert completion.token_ids[-1] == ord(">")  # nothing may follow: no end is waited for
        assert completion.stop_reason is None


def test_a_generic_object() -> None:
    schema = {"type": "object"}
    many = [params("json_schema", schema, seed=seed, max_tokens=100) for seed in range(20)]
    ended = [c.text for c in complete(*many) if c.finish_reason == "stop"]
    assert ended
    assert all(isinstance(json.loads(text), dict) for text in ended)


def test_an_end_comes_only_where_the_text_may_end() -> None:
    """However likely it is; and under ignore_eos never."""
    likely = {256: 100.0, 258: 100.0}
    first, second = complete(
        params("regex", "ab{2,4}", logit_bias=likely),
        params("regex", "ab{2,4}", logit_bias=likely, ignore_eos=True),
    )
    assert (first.text, first.stop_reason in likely) == ("abb", True)
    assert (second.text, second.stop_reason) == ("abbbb", None)


def test_an_ordinary_id_that_ends_answers_does_so_only_at_the_end() -> None:
    model = build(eos_token_id=ord("b"))
    engine = Engine(model, BYTES)
    (completion,) = engine.generate([PROMPT], params("regex", "a[abc]{5}", max_tokens=9))
    assert re.fullmatch("a[ac]{5}", completion.text)


def test_stop_strings_and_length_end_it_early() -> None:
    first, second = complete(
        params("regex", "abcdef", stop=("cd",)), params("regex", "abcdef", max_tokens=2)
    )
    assert (first.text, first.finish_reason, first.stop_reason) == ("ab", "stop", "cd")
    assert (second.text, second.finish_reason) == ("ab", "length")


def test_logprobs_are_the_models_own() -> None:
    (completion,) = complete(params("regex", "[ab]{4}", logprobs=1))
    ids = PROMPT + completion.token_ids
    expected = full_pass_logits(MODEL, ids).log_softmax(-1)
    for place, logprob in enumerate(completion.logprobs, len(PROMPT) - 1):
        assert logprob.logprob == pytest.approx(float(expected[place, ids[place + 1]]), abs=1e-4)


def mixture() -> list[SamplingParams]:
    return [
        params("json_schema", PERSON),
        SamplingParams(max_tokens=30, ignore_eos=True),
        params("json_schema", PERSON, seed=1, frequency_penalty=1.0),
        SamplingParams(max_tokens=30, temperature=1.0, seed=5, ignore_eos=True),
        params("regex", "[a-z]{20,30}", temperature=0, repetition_penalty=1.3),
    ]


@pytest.mark.parametrize("config", [{}, {"kv_tokens": 128, "block_size": 4}, {"speculate": 4}])
def test_a_batch_gives_what_each_gives_alone(config: dict[str, Any]) -> None:
    engine = Engine(MODEL, BYTES, EngineConfig(**config))
    together = engine.generate([PROMPT] * 5, mixture())
    alone = [complete(chosen)[0] for chosen in mixture()]
    assert together == alone
    if "kv_tokens" in config:
        assert engine.stats.preemptions > 0
    if "speculate" in config:
        assert engine.stats.spec_accepted > 0
    assert engine.stats.kv_used == 0


HOSTILE = {
    "no regex": ("regex", "("),
    "look around": ("regex", "(?=a)b"),
    "back reference": ("regex", r"(a)\1"),
    "repetition": ("regex", "a{1000000000}"),
    "deep regex": ("regex", "(" * 30000 + "a" + ")" * 30000),
    "long": ("regex", "a" * (64 * 1024 + 1)),
    "empty": ("regex", ""),
    "surrogate": ("regex", "\ud800"),
    "broken JSON": ("json_schema", '{"type": "object"'),
    "a list": ("json_schema", "[]"),
    "a number": ("json_schema", "1"),
    "nothing": ("json_schema", ""),
    "no type": ("json_schema", '{"type": "strin"}'),
    "wrong type": ("json_schema", '{"type": "integer", "minimum": "x"}'),
    "negative length": ("json_schema", '{"type": "string", "minLength": -1}'),
    "false": ("json_schema", "false"),
    "empty enum": ("json_schema", '{"enum": []}'),
    "loop": ("json_schema", '{"$ref": "#"}'),
    "longer loop": (
        "json_schema",
        '{"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}',
    ),
    "all loop": ("json_schema", '{"allOf": [{"$ref": "#"}, {"$ref": "#"}]}'),
    "any loop": ("json_schema", '{"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}'),
    "missing ref": ("json_schema", '{"$ref": "#/$defs/none"}'),
    "remote ref": ("json_schema", '{"$ref": "http://localhost/x.json"}'),
    "file ref": ("json_schema", '{"$ref": "file:///etc/passwd"}'),
    "deep schema": ("json_schema", '{"items":' * 6000 + "1" + "}" * 6000),
    "deep list": ("json_schema", '{"enum":' + "[" * 30000 + "]" * 30000 + "}"),
    "unknown keyword": ("json_schema", '{"not": {}}'),
    "unknown format": ("json_schema", '{"type": "string", "format": "x"}'),
    "bad pattern": ("json_schema", '{"type": "string", "pattern": "("}'),
    "giant enum": ("json_schema", json.dumps({"enum": list(range(100_000))})),
    "no lark": ("lark", "start: ("),
    "empty lark": ("lark", ""),
    "missing rule": ("lark", "start: foo"),
    "deep lark": ("lark", "start: " + "(" * 20000 + '"a"' + ")" * 20000),
    "deep options": ("lark", "start: " + "[" * 20000 + '"a"' + "]" * 20000),
    "lark loop": ("lark", "start: start"),
    "terminal loop": ("lark", 'start: A\nA: A "a"'),
    "lark imports a file": ("lark", '%import .etc.passwd\nstart: "a"'),
    "lark id": ("lark", "start: <[999999999]>"),
    "lark of JSON": ("lark", 'start: %json {"type": "strin"}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_bad_grammar_is_refused_in_one_line_and_harms_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The process may take long, on a busy machine, but not much of the processor: see _limit.
    monkeypatch.setattr(grammar_check, "PATIENCE", 60.0)
    kind, text = HOSTILE[name]
    started = time.process_time()
    with pytest.raises(UserError) as caught:
        ENGINE.submit(PROMPT, params(kind, text))
    assert time.process_time() - started < 3
    message = str(caught.value)
    assert "takes too much" not in message
    assert message.startswith("grammar: ")
    assert "\n" not in message
    assert len(message) < 250
    assert not ENGINE.has_work
    assert complete(params("regex", "ok"))[0].text == "ok"


COSTLY = {
    "exponential": ("regex", "(x+x+)+y"),
    "nested repetition": ("regex", "((a{1,1000}){1,1000}){1,1000}"),
    "exponential automaton": ("regex", "(a|b)*a(a|b){500}"),
    "intersections": ("lark", "start: A\nA: /(a|b)*a(a|b){18}/ & /(a|b)*b(a|b){17}/ & /.*aba.*/"),
    "complement": ("lark", "start: A\nA: ~/(a|b)*a(a|b){22}/"),
    "long repetition": ("regex", ".{10000}"),
    "ambiguous": ("lark", 'start: start start | "a" | start start start'),
    "large enum": ("json_schema", {"enum": [f"value number {i}" for i in range(2500)]}),
    "many properties": (
        "json_schema",
        {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(1000)}},
    ),
    "giant bounds": ("json_schema", {"type": "array", "minItems": 10**9, "maxItems": 10**9 + 1}),
    "product": (
        "json_schema",
        {"allOf": [
            {"anyOf": [
                {"type": "object", "properties": {f"p{i}_{j}": {"type": "integer"}}}
                for j in range(10)
            ]} for i in range(10)
        ]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_grammar_is_bounded(name: str) -> None:
    """Refused at once, or at work within bounds; perhaps until one is broken."""
    started = time.process_time()
    beside = SamplingParams(max_tokens=20, ignore_eos=True)
    try:
        first, second = complete(params(*COSTLY[name], max_tokens=20), beside)
    except UserError:
        pass
    else:
        assert first.finish_reason in ("stop", "length", "error")
        assert second == complete(beside)[0]
    assert time.process_time() - started < 5
    assert complete(params("regex", "ok"))[0].text == "ok"


def test_a_bound_that_breaks_on_the_way_ends_that_request_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(grammar_check.LIMITS, "max_lexer_states", 60)
    beside = SamplingParams(max_tokens=20, ignore_eos=True)
    engine = Engine(MODEL, BYTES)
    alphabet = params("regex", "(abcdefgh|ijklmnop|qrstuvwx){100}", max_tokens=100, logprobs=0)
    first, second = engine.generate([PROMPT] * 2, [alphabet, beside])
    assert first.finish_reason == "error"
    assert first.error is not None
    assert first.error.startswith("grammar: ")
    assert 0 < len(first.token_ids) == len(first.logprobs) < 100
    assert second == complete(beside)[0]
    assert engine.stats.kv_used == 0


@pytest.mark.parametrize("speculate", [0, 5])
def test_whatever_a_constraint_raises_is_its_own_requests(
    monkeypatch: pytest.MonkeyPatch, speculate: int
) -> None:
    real = grammar.Matching.allowed
    calls = 0

    def breaks(self: grammar.Matching) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise ConstraintError("it broke")
        return real(self)

    engine = Engine(MODEL, BYTES, EngineConfig(speculate=speculate))
    engine.generate([PROMPT], params("regex", "a{2}"))  # compiled before calls are counted
    monkeypatch.setattr(grammar.Matching, "allowed", breaks)
    (completion,) = engine.generate([PROMPT], params("regex", "a{30}", logprobs=0))
    assert (completion.finish_reason, completion.error) == ("error", "grammar: it broke")
    assert completion.text == "a" * len(completion.token_ids)
    assert 0 < len(completion.token_ids) == len(completion.logprobs) < 30
    assert engine.stats.kv_used == 0


EXPLODING = {
    "steps": '{"type": "integer", "multipleOf": 99999999}',
    "products": json.dumps(
        {"allOf": [{"type": "string", "pattern": f"(a|b)*a(a|b){{{n}}}"} for n in range(10, 30)]}
    ),
}


@pytest.mark.parametrize("name", EXPLODING)
@pytest.mark.parametrize("patience", [1.0, 60.0])
def test_what_takes_too_long_is_given_up(
    monkeypatch: pytest.MonkeyPatch, name: str, patience: float
) -> None:
    """Minutes or gigabytes of Rust, which knows no interruption: it dies in another process, when
    it had its seconds of the processor or by the clock."""
    monkeypatch.setattr(grammar_check, "PATIENCE", patience)
    engine = Engine(MODEL, BYTES)
    started = time.monotonic()
    for _ in range(2):
        with pytest.raises(UserError, match="takes too"):
            engine.submit(PROMPT, params("json_schema", EXPLODING[name]))
    assert time.monotonic() - started < 2 * (patience + grammar_check.START_SECONDS)
    assert engine.generate([PROMPT], params("regex", "ok"))[0].text == "ok"


def test_a_process_that_dies_is_started_again() -> None:
    engine = Engine(MODEL, BYTES)
    checker = engine._grammars._checker
    assert engine.generate([PROMPT], params("regex", "ok"))[0].text == "ok"
    assert checker._process is not None
    checker._process.kill()
    checker._process.wait()
    assert engine.generate([PROMPT], params("regex", "yes"))[0].text == "yes"
    process = checker._process
    del engine, checker
    gc.collect()
    assert process.poll() is not None


def test_a_grammar_that_nobody_has_looked_at_is_not_called_bad(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its time has not come, or the process does not start; afterwards it works."""
    monkeypatch.setattr(grammar_check, "WAIT", 0.01)
    engine = Engine(MODEL, BYTES)
    engine.submit(PROMPT, params("regex", "known"))
    checker = engine._grammars._checker
    with checker._lock:  # another is being compiled
        with pytest.raises(QueueFull, match="being compiled; try again later"):
            engine.submit(PROMPT, params("regex", "new"))
        engine.submit(PROMPT, params("regex", "known", seed=1))
    assert checker._process is not None
    for broken in ("/no/such/python", "/bin/false"):
        checker._process.kill()
        checker._process.wait()
        with monkeypatch.context() as patched:
            patched.setattr(grammar_check.sys, "executable", broken)
            with pytest.raises(QueueFull, match="does not start"):
                engine.submit(PROMPT, params("regex", "new"))
    assert engine.generate([PROMPT], params("regex", "new"))[0].text == "new"


def test_a_mask_that_takes_too_long_ends_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, BYTES)
    engine.generate([PROMPT], params("regex", "a{5}"))
    monkeypatch.setattr(grammar, "MASK_SECONDS", 0.0)
    (completion,) = engine.generate([PROMPT], params("regex", "a{5}"))
    assert (completion.finish_reason, completion.token_ids) == ("error", [])
    assert completion.error == "grammar: it takes too much time; simplify it"


def test_grammars_may_name_special_tokens() -> None:
    (completion,) = complete(params("lark", 'start: "a" <|im_start|> "b" <[99]>'))
    assert completion.token_ids == [97, 257, 98, 99]


def test_grammars_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(MODEL, BYTES)
    compiled: list[Any] = []
    compile_ = grammar.compile_grammar
    monkeypatch.setattr(
        grammar, "compile_grammar", lambda *args: compiled.append(args) or compile_(*args)
    )
    chosen = [params("regex", "[a-z]{5}", seed=seed) for seed in range(5)]
    texts = [completion.text for completion in engine.generate([PROMPT] * 5, chosen)]
    assert len(compiled) == 1
    assert len(set(texts)) > 1
    assert texts == [engine.generate([PROMPT], one)[0].text for one in chosen]
    for number in range(grammar.KEPT + 1):
        engine.generate([PROMPT], params("regex", f"{number}"))
    engine.generate([PROMPT], chosen[0])
    assert len(compiled) == grammar.KEPT + 3


def test_without_llguidance_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"pip install 'qwen2\[serve\]'"):
        Engine(MODEL, BYTES).submit(PROMPT, params("regex", "a"))


def test_grammars_from_many_threads() -> None:
    engine = Engine(MODEL, BYTES)
    thread = EngineThread(engine)
    thread.start()
    texts: list[str] = []

    def ask(number: int) -> None:
        with pytest.raises(UserError):
            thread.submit(PROMPT, params("regex", "(" * (number + 1)))
        done = threading.Event()
        request = thread.submit(
            PROMPT, params("regex", f"[a-c]{{{number % 3 + 1}}}", seed=number),
            on_output=lambda output: done.set() if output.finish_reason else None,
        )  # fmt: skip
        assert done.wait(30)
        texts.append(request.text)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(12)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(map(len, texts)) == [1] * 4 + [2] * 4 + [3] * 4
    assert thread.alive
    thread.stop()


@pytest.mark.real
@pytest.mark.slow
def test_the_real_model_answers_in_json(real_checkpoint: Path) -> None:
    """What it is told, in the form it is told; greedy and drawn, and guessing beside a grammar."""
    model, tokenizer = qwen2.load(real_checkpoint)
    engine = Engine(model, tokenizer, EngineConfig(speculate=4))
    question = "Extract: Maria Weber is 34 years old and likes chess and rowing."
    ids, _ = ChatTemplate().encode(
        tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True
    )
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "hobbies": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        },
        "required": ["name", "age", "hobbies"],
        "additionalProperties": False,
    }
    chosen = [params("json_schema", schema, temperature=0)]
    chosen += [params("json_schema", schema, seed=seed) for seed in range(2)]
    chosen += [params("regex", "(yes|no), [a-z ]{3,20}\\.", seed=1)]
    completions = engine.generate([ids] * len(chosen), chosen)
    assert all(completion.error is None for completion in completions)
    for completion in completions[:3]:
        if completion.finish_reason == "stop":
            assert list(json.loads(completion.text)) == ["name", "age", "hobbies"]
    first = json.loads(completions[0].text)
    assert (first["name"], first["age"]) == ("Maria Weber", 34)
    assert re.fullmatch(r"(yes|no), [a-z ]{3,20}\.", completions[3].text)
    for text in ("(", "a{1000000000}"):
        with pytest.raises(UserError):
            engine.submit(ids, params("regex", text))
