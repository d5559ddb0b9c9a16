"""Prompts, the form of answers, and the checks that decide whether one becomes a document."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.synthesis.checks import Checks, content_share, judge, run_share
from qwen2.synthesis.excerpts import ExcerptConfig, cut
from qwen2.synthesis.generator import Answer
from qwen2.synthesis.tasks import OWN, Task, TaskConfig, good_pairs, pairs
from qwen2.tokenizer import Tokenizer

BRIDGE = (
    "The bridge was opened in March 1890 by the Prince of Wales and spans a total length of more "
    "than two thousand metres, which made it the longest of its kind in the whole world."
)


def task(name: str, **config: Any) -> Task:
    return Task.of(name, TaskConfig.parse({"share": 1.0, **config}))


@pytest.mark.parametrize("name", OWN)
def test_every_choice_of_our_prompts_says_what_it_should(name: str) -> None:
    own = task(name)
    for choice, values in own.text.choices.items():
        for key, words in values.items():
            chosen = {c: next(iter(v)) for c, v in own.text.choices.items()} | {choice: key}
            (message,) = own.messages("<|im_end|>{{ 7 * 7 }}", "de", chosen)
            assert words.strip() in message["content"]
            assert "in German" in message["content"]
            assert "<|im_end|>{{ 7 * 7 }}" in message["content"]  # a text is never a template
    (unknown,) = own.messages("text", None, {c: next(iter(v)) for c, v in own.text.choices.items()})
    assert "in the language of the" in unknown["content"]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"choices": {"asked": ["fact"]}}, "choices.asked: there are facts, reasons"),
        ({"choices": {"style": ["plain"]}}, "choices.style: there are asked"),
        ({"checks": {"caracters": 3}}, "did you mean 'characters'"),
        ({"prompt": "no.yaml"}, "no such recipe"),
    ],
)
def test_a_task_that_cannot_be(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        task("qa", **config)


@pytest.mark.parametrize(
    ("user", "said"),
    [
        ("Say {{ txet }}", "names 'txet'; there are language, text"),
        ("Say it", "has no {{ text }}"),
        ("{% if %}{{ text }}", "prompt of task 'own', line 1"),
        ("{{ text.__class__.__mro__ }}", "unsafe"),
    ],
)
def test_a_prompt_of_ones_own_that_cannot_be(tmp_path: Path, user: str, said: str) -> None:
    import yaml

    values = {"kind": "synthetic/own", "form": "text", "user": user, "checks": {}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=said):
        task("own", prompt=str(tmp_path / "own.yaml")).messages("text", None, {})


def test_an_unknown_task_is_told() -> None:
    with pytest.raises(UserError, match="ours are qa, rewrite, textbook"):
        task("quiz")


@pytest.mark.parametrize(
    "answer",
    [
        "Q: Who opened it?\nA: The Prince.\n\nQ: When?\nA: In March\n1890.",
        "**Question 1:** Who opened it?\n**Answer 1:** The Prince.\n\n**Q2:** When?\n"
        "**A2:** In March 1890.",
        "Here they are:\n\n- Q: Who opened it?\n  A: The Prince.\n- Q: When?\n  A: In March 1890.",
        "1. Q: Who opened it?\nA: The Prince.\n2. Q: When?\nA: In March 1890.",
    ],
    ids=["asked form", "bold", "list", "numbers"],
)
def test_pairs_are_found_in_what_models_make_of_the_form(answer: str) -> None:
    assert pairs(answer) == [
        {"question": "Who opened it?", "answer": "The Prince."},
        {"question": "When?", "answer": "In March 1890."},
    ]


def test_pairs_of_another_script_and_none() -> None:
    assert pairs("问：谁开了桥？\n答：王子。") == [{"question": "谁开了桥？", "answer": "王子。"}]
    assert pairs("Q: Who?\nA: He.\n\nI hope that this helps.") == [
        {"question": "Who?", "answer": "He."}
    ]
    assert pairs("A: no question") == pairs("Q: no answer") == pairs("") == []


def test_documents_of_pairs_come_in_several_formats() -> None:
    made = {
        task("qa").document("Q: Who?\nA: He.\nQ: When?\nA: Now.", "", draw) for draw in range(6)
    }
    assert made == {
        "Q: Who?\nA: He.\n\nQ: When?\nA: Now.",
        "Who?\nHe.\n\nWhen?\nNow.",
        "1. Who?\n\n   He.\n\n2. When?\n\n   Now.",
    }
    assert task("rewrite").document("```markdown\n# A\ntext\n```", "", 0) == "# A\ntext"


def test_pairs_that_say_nothing_new_are_left_out() -> None:
    prompt = "For example:\nQ: How hot?\nA: It is hot."
    found = pairs(
        "Q: How hot?\nA: Very.\nQ: Who?\nA: He.\nQ: What of her?\nA: He.\n"
        "Q: What does the text say?\nA: Much.\nQ: When?\nA: It is hot.\nQ: Why?\nA: So."
    )
    assert len(found) == 6
    assert [pair["question"] for pair in good_pairs(found, prompt)] == ["Who?", "Why?"]
    assert task("qa").document("Q: How hot?\nA: Very.", prompt, 0) == ""


def verdict(answer: Answer, language: str | None = "en", **limits: float) -> str | None:
    checks = Checks.parse({"characters": 20, "shared": 0.1, "copied": 0.9, **limits})
    prompt = "Rewrite the text below and answer with the rewritten text alone, without a remark."
    return judge(answer, answer.text.strip(), BRIDGE, prompt, language, checks)[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The Prince of Wales opened the bridge in 1890; no other had such length then.", None),
        (" \n", "empty"),
        ("I'm sorry, but I can't rewrite this bridge.", "a refusal"),
        ("抱歉，我无法提供帮助。", "a refusal"),
        ("**I cannot** help with the bridge here.", "a refusal"),
        ("Bridge of 1890.", "shorter than 20 characters"),
        (BRIDGE, "more than 90% copied from the excerpt"),
        ("Cats drink water; elephants remember every single journey.", "less than 10% of its"),
        (
            "Rewrite the text below and answer with the rewritten text alone, without a remark. "
            "The bridge was opened in 1890.",
            "more than 20% repeats the prompt",
        ),
    ],
)
def test_each_check_has_its_reason(text: str, reason: str | None) -> None:
    found = verdict(Answer(text, "stop"))
    assert found == reason if reason is None else (found or "").startswith(reason)


def test_a_cut_answer_and_one_in_another_language() -> None:
    assert verdict(Answer("The bridge was opened in 1890 by", "length")) == "cut off at max_tokens"
    german = "Die Brücke wurde im Jahr 1890 vom Prinzen von Wales eröffnet und war die längste."
    assert verdict(Answer(german, "stop"), shared=0) == "in de, the excerpt in en"
    assert verdict(Answer(german, "stop"), language=None, shared=0) is None
    assert verdict(Answer(german, "stop"), language="de", shared=0) is None


def test_shares_by_hand() -> None:
    assert run_share("a b c d e f g h", "x a b c d e f g h y") == 1.0
    assert run_share("a b c d e f g h i", "a b c d e f g h") == 0.5
    assert run_share("", "a b") == 0.0
    assert content_share("Bridge over troubled water", "a bridge, water") == pytest.approx(2 / 3)
    assert content_share("桥梁建成", "桥梁很长") == pytest.approx(1 / 3)
    assert content_share("to be or not", "x") == 1.0


TOKENIZER = Tokenizer.qwen2()
WORDS = st.sampled_from(["word", "Brücke ", "橋", "\n", "\n\n", ". ", " ", "x" * 30, "🙂"])


@settings(max_examples=60)
@given(st.lists(WORDS, max_size=120).map("".join), st.integers(16, 60), st.integers(1, 5))
def test_excerpts_are_parts_of_the_text_that_fit(text: str, tokens: int, most: int) -> None:
    config = ExcerptConfig(tokens=tokens, least=4, per_document=most)
    excerpts = cut(text, config, TOKENIZER)
    assert len(excerpts) <= most
    end = 0
    for excerpt in excerpts:
        assert text[excerpt.start : excerpt.stop] == excerpt.text == excerpt.text.strip() != ""
        assert excerpt.start >= end
        end = excerpt.stop
        # Pieces are counted one by one; at their seams tokens may join, or part by one each.
        assert len(TOKENIZER.encode(excerpt.text)) <= tokens * 1.25 + 2


def test_cuts_are_at_the_ends_of_paragraphs() -> None:
    paragraph = "A sentence of the paragraph that is here. " * 4
    text = "\n\n".join(f"{i} {paragraph}" for i in range(9))
    size = len(TOKENIZER.encode(f"0 {paragraph}\n\n"))
    excerpts = cut(text, ExcerptConfig(tokens=2 * size + 5, least=8, per_document=9), TOKENIZER)
    assert [e.text.count("\n\n") for e in excerpts] == [1, 1, 1, 1, 0]
    assert all(e.text[0].isdigit() and e.text.endswith("here.") for e in excerpts)
    spread = cut(text, ExcerptConfig(tokens=2 * size + 5, least=8, per_document=2), TOKENIZER)
    assert [e.text[0] for e in spread] == ["0", "4"]
    assert cut("too short", ExcerptConfig(), TOKENIZER) == []
