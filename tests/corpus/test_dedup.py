from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from qwen2.corpus import Document, deduplicate, text_digest

# A small alphabet with white space and both forms of é, so that equal texts do come up.
TEXTS = st.lists(st.text("ab \n\té\u0301e", max_size=4), max_size=30)


def documents(texts: list[str]) -> list[Document]:
    return [Document(text, str(i), "s", "ab"[i % 2]) for i, text in enumerate(texts)]


@given(TEXTS)
def test_keeps_the_first_of_each_text_and_is_idempotent(texts: list[str]) -> None:
    given_, removed = documents(texts), Counter[str]()
    kept = list(deduplicate(given_, removed))
    first_of = {text_digest(d.text): d for d in reversed(given_)}
    assert kept == [d for d in given_ if first_of[text_digest(d.text)] is d]
    assert removed.total() == len(given_) - len(kept)

    again = Counter[str]()
    assert list(deduplicate(kept, again)) == kept
    assert not again


def test_normalises_accents_and_white_space_but_not_case() -> None:
    assert text_digest("caf\u00e9  au\nlait ") == text_digest("cafe\u0301 au lait")
    assert text_digest("a b") != text_digest("ab")
    assert text_digest("A") != text_digest("a")
    assert len(text_digest("")) == 16


def test_counts_by_kind_and_compares_with_an_older_set() -> None:
    seen, removed = {text_digest("old")}, Counter[str]()
    fresh = [
        Document("old", "1", "s", "prose"),
        Document("new", "2", "s", "code"),
        Document(" new", "3", "s", "code"),
    ]
    assert [d.id for d in deduplicate(fresh, removed, seen)] == ["2"]
    assert removed == {"prose": 1, "code": 1}
    assert text_digest("new") in seen
