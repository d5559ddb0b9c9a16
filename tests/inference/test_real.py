"""The real checkpoint talks: facts of the report, code that works, every number type."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import qwen2
from qwen2.inference import Engine, EngineConfig, SamplingParams
from qwen2.model.extend import extended, with_config
from qwen2.tokenizer.chatml import ChatTemplate

pytestmark = [pytest.mark.real, pytest.mark.slow]

ANSWER = [785, 6722, 315, 9625, 374, 12095, 13, 151645]


def ask(model: Any, tokenizer: Any, question: str, tokens: int) -> Any:
    """Greedy answer under Qwen2's own template and system text."""
    messages = [{"role": "user", "content": question}]
    ids, _ = ChatTemplate().encode(tokenizer, messages, add_generation_prompt=True)
    return Engine(model, tokenizer).generate([ids], SamplingParams(max_tokens=tokens))[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_greedy_ids_with_the_cache(real_checkpoint: Path, dtype: str) -> None:
    """In fp16 too, where |q·k| of layer 0 overflows unless scores are in fp32."""
    model, tokenizer = qwen2.load(real_checkpoint, dtype=dtype)
    completion = ask(model, tokenizer, "What is the capital of France?", 20)
    assert completion.token_ids == ANSWER
    assert completion.text == "The capital of France is Paris."
    assert completion.finish_reason == "stop"


def test_greedy_ids_whatever_shares_the_batch(real_checkpoint: Path) -> None:
    """Small pieces of prompts, others beside, and a cache so small that some are preempted."""
    model, tokenizer = qwen2.load(real_checkpoint, dtype="fp32")
    config = EngineConfig(max_batch_tokens=13, max_running=4, block_size=4, kv_tokens=64)
    engine = Engine(model, tokenizer, config)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids, _ = ChatTemplate().encode(tokenizer, messages, add_generation_prompt=True)
    params = SamplingParams(max_tokens=20)
    others = [engine.submit(ids[: 9 * count], params) for count in (1, 2, 3)]
    requests = [engine.submit(ids, params) for _ in range(2)]
    while engine.step():
        pass
    assert [request.output for request in requests] == [ANSWER] * 2
    assert engine.stats.preemptions > 0
    assert requests[1].cached_tokens > 0
    assert all(request.finish_reason for request in others)
    assert engine.stats.kv_used == 0


def test_the_first_step_by_its_figures(real_checkpoint: Path) -> None:
    """The five likeliest tokens: differences of their logits, measured elsewhere in fp32."""
    model, tokenizer = qwen2.load(real_checkpoint, dtype="fp32")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids, _ = ChatTemplate().encode(tokenizer, messages, add_generation_prompt=True)
    params = SamplingParams(max_tokens=1, logprobs=5)
    (completion,) = Engine(model, tokenizer).generate([ids], params)
    (first,) = completion.logprobs
    assert [token for token, _ in first.top] == [785, 2121, 49000, 59604, 40]
    logits = [23.237, 18.960, 18.959, 17.692, 16.853]
    differences = [logprob - first.logprob for _, logprob in first.top]
    assert differences == pytest.approx([x - logits[0] for x in logits], abs=0.01)


@pytest.mark.parametrize("extend", ["dca+yarn", "dca"])
def test_a_longer_context_changes_no_short_answer(real_checkpoint: Path, extend: str) -> None:
    model, tokenizer = qwen2.load(real_checkpoint, context=131_072, extend=extend)
    assert model.config.context_length == 131_072
    assert ask(model, tokenizer, "What is the capital of France?", 20).token_ids == ANSWER


@pytest.mark.parametrize("extend", ["dca+yarn", "yarn"])
def test_it_finds_what_was_said_many_chunks_ago(real_checkpoint: Path, extend: str) -> None:
    """As if it had been trained on 512 tokens: the code is six times as far away."""
    model, tokenizer = qwen2.load(real_checkpoint)
    model = extended(with_config(model, max_position_embeddings=512), 8192, extend)
    filler = "".join(f"Line {i}: the weather was fair and nothing happened.\n" for i in range(230))
    question = (
        f"The access code of the tower is 7481.\n{filler}\nWhat is the access code of the tower?"
    )
    completion = ask(model, tokenizer, question, 30)
    assert len(completion.prompt_token_ids) > 6 * 512
    assert "7481" in completion.text


# What a small arithmetic function may be made of. No attribute, import or other call can be
# written with these, so it can be run here.
HARMLESS = (
    ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Name, ast.Load, ast.Store,
    ast.Constant, ast.Return, ast.If, ast.IfExp, ast.For, ast.While, ast.Break, ast.Continue,
    ast.Assign, ast.AugAssign, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Call,
    ast.Expr, ast.Tuple, ast.operator, ast.cmpop, ast.boolop, ast.unaryop,
)  # fmt: skip


def harmless(code: str, name: str) -> Callable[..., Any]:
    """The function `name` of `code`, if it is made of arithmetic and calls of range and itself."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        assert isinstance(node, HARMLESS), ast.dump(node)
        assert not isinstance(node, ast.Pow)
        if isinstance(node, ast.Call):
            assert isinstance(node.func, ast.Name)
            assert node.func.id in ("range", "int", name), node.func.id
    names: dict[str, Any] = {"__builtins__": {"range": range, "int": int}}
    exec(compile(tree, "answer", "exec"), names)
    function: Callable[..., Any] = names[name]
    return function


def test_it_writes_a_working_function(real_checkpoint: Path) -> None:
    model, tokenizer = qwen2.load(real_checkpoint)
    question = (
        "Write a Python function gcd(a, b) that returns the greatest common divisor with a while "
        "loop. Answer with the code alone, without comments, docstring or example."
    )
    text = ask(model, tokenizer, question, 120).text
    fenced = re.search(r"```(?:python)?\n(.*?)```", text, flags=re.DOTALL)
    gcd = harmless(fenced[1] if fenced else text, "gcd")
    assert [gcd(12, 18), gcd(17, 5), gcd(0, 9), gcd(100, 75)] == [6, 1, 9, 25]
