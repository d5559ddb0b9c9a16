"""The rule of the report against a search of all stretches, and contamination that is planted."""

from __future__ import annotations

import random
import re

import numpy as np
import pytest
from hypothesis import given, settings, target
from hypothesis import strategies as st

from qwen2.corpus import candidates
from qwen2.corpus.candidates import SEGMENT, STEPS, Candidates, step_of
from qwen2.corpus.decontaminate import (
    Decontaminator,
    EvalItem,
    LcsRule,
    NgramOverlap,
    ngram_hashes,
)
from qwen2.corpus.lcs import lcs_length
from qwen2.tokenizer import Tokenizer

RULE = LcsRule()


class Words:
    """A tokenizer with one token a word."""

    def __init__(self) -> None:
        self.ids: dict[str, int] = {}

    def __call__(self, text: str) -> list[int]:
        return [self.ids.setdefault(word, 7 * len(self.ids)) for word in text.split()]


def filler(number: int, seed: int = 0, common: int = 400) -> list[str]:
    """Words none of which is in an item (those are `q…` and `the`)."""
    r = random.Random(seed)
    return [f"w{r.randrange(common)}" for _ in range(number)]


def item(number: int, name: str = "q") -> list[str]:
    return [f"{name}{i}" for i in range(number)]


def search(items: list[list[str]], *texts: list[str]) -> list[list[tuple[str, int]]]:
    """Numbers of the items that are found in each text, with the length in common."""
    tests = [EvalItem("set", str(i), " ".join(words)) for i, words in enumerate(items)]
    found = Decontaminator(tests, Words()).hits([" ".join(text) for text in texts])
    return [[(hit.item, hit.length) for hit in hits] for hits in found]


def test_thresholds_are_exact() -> None:
    assert [RULE.need(n) for n in (1, 13, 21, 22, 25, 35, 40)] == [13, 13, 13, 14, 15, 21, 24]
    assert all(RULE.need(5 * k) == 3 * k for k in range(5, 200))


@pytest.mark.parametrize(("common", "found"), [(12, False), (13, True)])
def test_thirteen_tokens(common: int, found: bool) -> None:
    question = item(20)  # 0.6 of 20 is 12: the 13 decide
    text = filler(300) + question[:common] + filler(300, 1)
    assert search([question], text) == [[("0", 13)] if found else []]


@pytest.mark.parametrize(("common", "found"), [(59, False), (60, True)])
def test_six_tenths(common: int, found: bool) -> None:
    question = item(100)
    text = filler(900) + question[20 : 20 + common] + filler(900, 1)
    assert search([question], text) == [[("0", 60)] if found else []]


@pytest.mark.parametrize(("size", "found"), [(12, False), (13, True)])
def test_the_shortest_sequences(size: int, found: bool) -> None:
    question, other = item(size), item(100, "r")
    expected = [("0", size)] if found else []
    assert search([question, other], filler(500) + question + filler(500)) == [expected]
    # A document that is an excerpt of an item: the share is that of the document.
    excerpt = other[40 : 40 + size]
    assert search([question, other], excerpt) == [[("1", size)] if found else []]


def test_six_tenths_of_a_short_document() -> None:
    question = item(400)
    own = filler(20)
    for common, found in [(29, False), (30, True)]:
        excerpt = question[100 : 100 + common]
        text = [w for pair in zip(excerpt, own, strict=False) for w in pair] + excerpt[20:]
        text += filler(50 - len(text), 1)
        assert len(text) == 50
        assert search([question], text) == [[("0", 30)] if found else []]


@pytest.mark.parametrize("place", [0, 1, 25, 500, 505, 511, 512, 513, 990, 1000, 1023, 2000])
@pytest.mark.parametrize("size", [13, 31, 32, 33, 64, 128, 129, 300, 512])
def test_a_copy_anywhere(place: int, size: int) -> None:
    question = item(size)
    text = filler(place) + question + filler(700, 1)
    assert search([item(50, "r"), question], text) == [[("1", size)]]
    assert search([item(50, "r"), question], filler(place) + question) == [[("1", size)]]


def test_words_put_in_left_out_and_changed() -> None:
    r = random.Random(3)
    for size in (20, 60, 200):
        question = item(size)
        text: list[str] = []
        for i, word in enumerate(question):
            if i % 5 != 4:  # one of five left out
                text.append(word)
            if r.random() < 0.3:
                text.append(f"w{r.randrange(400)}")
        assert search([question], filler(333) + text + filler(333, 1)) == [[("0", size * 4 // 5)]]
        # Every other word is a new one: no two of its words stand together.
        spread = [w for word in question for w in (word, f"n{word}")]
        found = search([question], filler(150) + spread + filler(333, 1))
        assert found[0][0][0] == "0"
        assert found[0][0][1] >= 0.75 * size


def test_another_order_is_not_found() -> None:
    question = item(40)
    assert search([question], filler(100) + question[::-1] + filler(100)) == [[]]
    halves = question[20:] + question[:20]
    assert search([question], filler(100) + halves + filler(100)) == [[]]


def test_what_is_spread_over_a_long_document_is_not_found() -> None:
    question = item(20)
    text = [w for i, word in enumerate(question) for w in [*filler(30, i), word]]
    assert search([question], text) == [[]]


def test_an_excerpt_of_a_long_item_and_the_longest_match() -> None:
    passage = item(3000)
    for start in (0, 700, 1234, 2600):
        text = filler(800) + passage[start : start + 400] + filler(800, 1)
        [[(name, length)]] = search([passage], text)
        assert name == "0"
        assert length >= RULE.need(512)
    # The better of two copies counts.
    question = item(30)
    text = question[:20] + filler(500) + question[:28] + filler(500, 1) + question[:25]
    assert search([question], text) == [[("0", 28)]]


WORD = st.integers(0, 30).map(lambda i: "the" if i < 8 else f"q{i}")


@settings(max_examples=150)
@given(
    st.lists(st.lists(WORD, min_size=10, max_size=45), min_size=1, max_size=6),
    st.lists(st.lists(WORD, max_size=120), min_size=1, max_size=4),
    st.sampled_from([0.01, 0.5, 1.0]),
    st.data(),
)
def test_equals_a_search_of_all_stretches(
    items: list[list[str]], texts: list[list[str]], spare: float, data: st.DataObject
) -> None:
    """Also where every word is frequent, and with copies that are damaged."""
    for i, text in enumerate(texts):
        copied = data.draw(st.sampled_from(items))
        gone = data.draw(st.sets(st.integers(0, len(copied) - 1), max_size=len(copied) // 2))
        texts[i] = text + [word for j, word in enumerate(copied) if j not in gone]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "SEGMENT", 64)
        patch.setattr(candidates, "SPARE", spare)
        found = search(items, *texts)
        expected = [
            [(str(i), n) for i, words in enumerate(items) if (n := reference(text, words))]
            for text in texts
        ]
    assert found == expected
    target(float(sum(map(len, expected))))


def reference(text: list[str], words: list[str]) -> int:
    """The longest match of all stretches, 0 if it is not enough."""
    encode = Words()
    document, sequence = encode(" ".join(text)), encode(" ".join(words))
    shorter, longer = sorted((document, sequence), key=len)
    if len(document) == len(sequence):
        shorter, longer = sequence, document
    step = step_of(len(shorter))
    starts = list(range(0, len(longer), step))
    if longer is document:  # stretches begin anew in every segment
        group = next(g for g in candidates.GROUPS if g >= len(sequence))
        size = max(candidates.SEGMENT, STEPS * step_of(group))
        starts = [s for low in range(0, len(longer), size) for s in range(low, low + size, step)]
    best = max((lcs_length(shorter, longer[s : s + STEPS * step]) for s in starts), default=0)
    return best if best >= RULE.need(len(shorter)) else 0


@pytest.mark.parametrize("spare", [0.01, 0.5, 1.0])
@pytest.mark.parametrize("start", [0, 20, 100, 480, 500])
def test_just_enough_spread_over_a_whole_stretch(
    spare: float, start: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(candidates, "SPARE", spare)
    question = item(40)  # stretches of 80 tokens, 20 apart
    places = [round(i * 79 / 23) for i in range(24)]
    text = filler(900)
    for place, word in zip(places, question[8:32], strict=True):
        text[start + place] = word
    assert search([question], text) == [[("0", 24)]]
    text[start + places[7]] = "w"
    assert search([question], text) == [[]]


def test_few_bins_at_a_time_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [item(20, f"i{i}") for i in range(30)]
    texts = [filler(400, i) + items[i] + filler(900, i + 50) + items[-i] for i in range(1, 9)]
    expected = search(items, *texts)
    assert [len(hits) for hits in expected] == [2] * 8
    monkeypatch.setattr(candidates, "MOST_BINS", 40)
    assert search(items, *texts) == expected
    assert [search(items, text)[0] for text in texts] == expected


def test_the_filter_leaves_out_nearly_all() -> None:
    r = random.Random(0)
    weights = [1 / (i + 2) for i in range(3000)]
    sequences = [
        np.array(r.choices(range(3000), weights, k=r.randrange(20, 90))) for _ in range(99)
    ]
    index = Candidates(sequences, RULE.need)
    document = index.code(np.array(r.choices(range(3000), weights, k=20 * SEGMENT)))
    stretches = sum(len(document) // step_of(len(s)) for s in sequences)
    assert len(index.inside([document])) < stretches / 50


TOKENIZER = Tokenizer.qwen2()
QUESTION = (
    "Natalia's bakery sold 48 loaves to her friends in April, and then it sold half as many "
    "in May. How many loaves did the bakery sell altogether in April and May, and what did they "
    "weigh?"
)
PROSE = (
    "The museum opened its doors again after two years of repairs. Visitors from the whole region "
    "came to see the restored paintings, and the director said that many more rooms would follow "
    "before winter. Entry stays free for children, while adults are asked for a small donation. "
)


@pytest.mark.parametrize(
    "copy",
    [
        QUESTION,
        QUESTION.upper(),
        QUESTION.replace(" ", "\n\n  "),
        re.sub(r"[^\w ]", "", QUESTION),
        "* " + QUESTION.replace(", ", " -- ").replace("?", "…"),
        QUESTION.replace("sold", "has quickly sold").replace("May", "the month of May"),
        QUESTION.replace("Natalia", "Alice").replace("loaves", "cakes"),
    ],
    ids=["verbatim", "capitals", "spaces", "bare", "punctuation", "inserted", "names"],
)
def test_planted_questions_are_found_with_evidence(copy: str) -> None:
    search = Decontaminator([EvalItem("maths", "17", QUESTION)], TOKENIZER.encode)
    text = PROSE * 6 + copy + "\n" + PROSE * 6
    [clean, [hit]] = search.hits([PROSE * 12, text])
    assert clean == []
    assert (hit.test_set, hit.item) == ("maths", "17")
    assert hit.share >= 0.6
    assert hit.length == round(hit.share * min(hit.document_tokens, hit.item_tokens))
    low, high = hit.document_span
    assert low <= len(PROSE) * 6 + len(copy) // 2 <= high
    assert "bakery" in hit.matched.lower()
    assert QUESTION[slice(*hit.item_span)].endswith("weigh")


def test_evidence_by_hand() -> None:
    question = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen."
    text = "So: One two three four five six, maybe SEVEN eight nine ten eleven twelve thirteen!"
    [[hit]] = Decontaminator([EvalItem("s", "a", question)], Words()).hits([text])
    assert (hit.length, hit.document_tokens, hit.item_tokens) == (13, 15, 14)
    assert hit.share == 13 / 14
    assert text[slice(*hit.document_span)] == text[4:-1]
    assert question[slice(*hit.item_span)] == question[: question.index(" fourteen")]
    assert hit.matched == (
        "One two three four five six … SEVEN eight nine ten eleven twelve thirteen"
    )


def test_items_that_are_too_short_are_told() -> None:
    search = Decontaminator([EvalItem("s", "a", "one two"), EvalItem("s", "b", "")], Words())
    assert [short.id for short in search.short] == ["a", "b"]
    assert search.hits(["one two " * 50, ""]) == [[], []]
    assert Decontaminator([], Words()).hits(["one two"]) == [[]]


def test_any_ngram() -> None:
    first, second = " ".join(item(20)), " ".join(item(30, "r"))
    items = [EvalItem("s", "a", first), EvalItem("s", "b", second), EvalItem("s", "c", "short")]
    overlap = NgramOverlap(items, Words())
    text = " ".join(filler(50) + item(20)[3:16] + ["x"] + item(30, "r")[:12])
    [(number, ours, theirs)] = overlap.hits(text)
    assert number == 0
    assert text[slice(*ours)] == first[slice(*theirs)] == " ".join(item(20)[3:16])
    assert [n for n, *_ in overlap.hits(text + " r12")] == [0, 1]
    assert list(overlap.hits("")) == list(overlap.hits("short")) == []
    assert list(NgramOverlap([], Words()).hits(text)) == []


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_ngram_hashes_are_of_ngrams(ids: list[int], n: int) -> None:
    hashes = ngram_hashes(np.array(ids, np.int64), n).tolist()
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    assert len(hashes) == len(grams)
    assert len(set(zip(hashes, grams, strict=True))) == len(set(hashes)) == len(set(grams))
