"""lm-eval, over our server, finds the log-likelihoods that the model has in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_models

pytest.importorskip("lm_eval.models.openai_completions")

PAIRS = [
    ("The capital of France is", " Paris"),
    ("2 + 2 =", " 4 and nothing else"),
    ("A", "B"),
    ("Überall ist es", " schön"),
    ("def f(x):\n", "    return x"),
    ("", " a beginning"),
]


def harness(served: Any, tokenizer: Path) -> Any:
    """lm-eval's client, with a tokenizer from a folder."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    return LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions",
        model="tiny",
        tokenizer=str(tokenizer),
        tokenizer_backend="huggingface",
        batch_size=4,
        max_length=512,
    )


def requests(kind: str, pairs: list[Any]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, arguments, index) for index, arguments in enumerate(pairs)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.BYTES.save(folder)
    return folder


def test_loglikelihoods_are_the_models_own(served: Any, tokenizer: Path) -> None:
    found = harness(served, tokenizer).loglikelihood(requests("loglikelihood", PAIRS))
    encode, end = tiny_models.BYTES.encode, tiny_models.BYTES.end_of_text_id
    for (context, continuation), (total, greedy) in zip(PAIRS, found, strict=True):
        bare = context.rstrip()  # lm-eval counts white space before it to the continuation
        before = encode(bare) or [end]
        after = encode(context[len(bare) :] + continuation)
        rows = tiny_models.full_pass_logits(served.engine.model, before + after).log_softmax(-1)
        own = rows[len(before) - 1 : -1]
        expected = sum(float(row[id_]) for row, id_ in zip(own, after, strict=True))
        assert total == pytest.approx(expected, abs=1e-3)
        likeliest = own[:, : tiny_models.BYTES.vocab_size].argmax(-1).tolist()
        assert greedy == (likeliest == after)


def test_generation_until_a_string(served: Any, tokenizer: Path) -> None:
    pairs = [("Hello", {"until": ["e", "\n"], "max_gen_toks": 30, "do_sample": False})]
    (text,) = harness(served, tokenizer).generate_until(requests("generate_until", pairs))
    ids = tiny_models.full_pass_greedy(served.engine.model, [*b"Hello"], 30)
    expected = tiny_models.BYTES.decode(ids)
    for stop in ("e", "\n", "<|im_end|>", "<|endoftext|>"):
        expected = expected.split(stop)[0]
    assert text == expected
