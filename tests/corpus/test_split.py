import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.corpus import Document, choose_held_out, split, split_key

CORPUS = st.lists(
    st.builds(
        lambda text, kind, group: Document(text, "", "", kind, group=group),
        st.text("abc", min_size=1, max_size=3),
        st.sampled_from(["code", "docstrings", "prose"]),
        st.none() | st.sampled_from(["f1", "f2", "f3"]),
    ),
    max_size=25,
)


Sized = tuple[str, str, int]


def held_out_keys(documents: list[Sized], fraction: float, seed: int = 0) -> frozenset[str]:
    chosen = choose_held_out(documents, fraction, seed)
    return frozenset(key for _, key, _ in documents if key in chosen)


def held(corpus: list[Document], fraction: float, seed: int) -> frozenset[str]:
    return held_out_keys([(d.kind, split_key(d), d.size) for d in corpus], fraction, seed)


@given(CORPUS, st.sampled_from([0.01, 0.3, 0.9]), st.integers(0, 5), st.randoms())
def test_same_sides_in_any_order(
    corpus: list[Document], fraction: float, seed: int, rng: random.Random
) -> None:
    shuffled = rng.sample(corpus, len(corpus))
    assert held(corpus, fraction, seed) == held(shuffled, fraction, seed)


@given(CORPUS, st.sampled_from([0.01, 0.3]), st.integers(0, 5))
def test_every_kind_that_can_be_parted_has_text_held_out(
    corpus: list[Document], fraction: float, seed: int
) -> None:
    keys = held(corpus, fraction, seed)
    for kind in {d.kind for d in corpus}:
        of_kind = [d for d in corpus if d.kind == kind]
        if len({split_key(d) for d in of_kind}) >= 2:
            assert any(split_key(d) in keys for d in of_kind)


def test_a_kind_whose_large_documents_chance_spares_gets_more_held_out() -> None:
    corpus = [("k", f"text:{i}", 1) for i in range(50)]
    by_chance = held_out_keys(corpus, 0.1)
    assert 2 <= len(by_chance) <= 10
    heavy = [(kind, key, size if key in by_chance else 1000) for kind, key, size in corpus]
    more = held_out_keys(heavy, 0.1)
    assert more > by_chance
    sizes = {key: size for _, key, size in heavy}
    total = sum(sizes.values())
    assert 0.05 * total <= sum(sizes[key] for key in more) < 0.05 * total + 1000


def test_documents_of_one_group_cannot_be_parted() -> None:
    groups = [f"group:{i}" for i in range(200)]
    held_alone = [g for g in groups if held_out_keys([("k", g, 5), ("k", g, 6)], 0.1)]
    assert 5 <= len(held_alone) <= 40  # by its hash only, as about 20 of 200 groups are


@given(CORPUS, CORPUS, st.integers(0, 5))
def test_chosen_by_hash_whatever_else_is_there(
    corpus: list[Document], more: list[Document], seed: int
) -> None:
    """A key that its own hash holds out is held out in every corpus."""
    old = {split_key(d) for d in corpus}
    assert held(corpus + more, 0.5, seed) & old >= {
        key for key in old if key in held_out_keys([("k", key, 1)], 0.5, seed)
    }


def test_docstrings_stay_with_their_code() -> None:
    corpus = [
        Document(f"{kind} of {i}", "", "", kind, group=f"stdlib/{i}.py")
        for i in range(200)
        for kind in ("code", "docstrings")
    ]
    keys = held(corpus, 0.1, 0)
    sides = {(d.group, split_key(d) in keys) for d in corpus}
    assert len(sides) == 200
    assert 8 <= len(keys) <= 35  # 20 expected, 3.5 standard deviations


def test_a_group_never_equals_a_text() -> None:
    text = Document("x", "", "", "k")
    named = Document("y", "", "", "k", group=split_key(text).removeprefix("text:"))
    assert split_key(text) != split_key(named)


def test_seed_changes_the_choice() -> None:
    keys = [("k", f"text:{i}", 1) for i in range(100)]
    assert held_out_keys(keys, 0.2, 0) != held_out_keys(keys, 0.2, 1)


@given(CORPUS, st.integers(0, 5))
def test_memory_is_bounded_and_the_choice_the_same(corpus: list[Document], seed: int) -> None:
    """With room for three keys a kind of no more chooses as with all; others still hold one out."""
    everything = held(corpus, 0.1, seed)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(split, "CANDIDATES", 3)
        few = held(corpus, 0.1, seed)
    of_kind: dict[str, set[str]] = {}
    for document in corpus:
        of_kind.setdefault(document.kind, set()).add(split_key(document))
    if all(len(keys) <= 3 for keys in of_kind.values()):
        assert few == everything
    assert all(keys & few for keys in of_kind.values() if len(keys) > 1)
