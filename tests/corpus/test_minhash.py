import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.corpus import minhash
from qwen2.corpus.minhash import MinHash, has_words, similarity

FAMILY = MinHash()


def pair(common: int, own: int, name: str) -> tuple[str, str]:
    """Two texts of single-word shingles with Jaccard similarity common / (common + 2 own)."""
    shared = [f"{name}c{i}" for i in range(common)]
    return tuple(  # type: ignore[return-value]
        " ".join(shared + [f"{name}{side}{i}" for i in range(own)]) for side in "xy"
    )


@pytest.mark.parametrize(("common", "own"), [(100, 50), (160, 20), (30, 35), (900, 50), (0, 100)])
def test_the_estimate_is_unbiased_and_as_exact_as_independent_permutations(
    common: int, own: int
) -> None:
    unigrams = MinHash(ngram=1)
    expected = common / (common + 2 * own)
    number = 1500
    pairs = [pair(common, own, f"p{i}") for i in range(number)]
    ours, theirs = (unigrams.signatures([p[side] for p in pairs]) for side in (0, 1))
    estimates = similarity(ours, theirs)
    error = np.sqrt(expected * (1 - expected) / unigrams.size)
    assert abs(estimates.mean() - expected) <= 4 * error / np.sqrt(number)
    if expected:
        assert estimates.std() == pytest.approx(error, rel=0.1)


@pytest.mark.parametrize("percent", [50, 60, 70, 80, 90, 95])
def test_candidates_follow_the_curve(percent: int) -> None:
    """At Jaccard similarity s a share 1 - (1 - s^8)^14 of pairs has a common band."""
    unigrams = MinHash(ngram=1)
    number, total = 1000, 400
    common = total * percent // 100
    pairs = [pair(common, (total - common) // 2, f"q{i}") for i in range(number)]
    ours, theirs = (
        unigrams.band_keys(unigrams.signatures([p[side] for p in pairs])) for side in (0, 1)
    )
    found = (ours == theirs).any(axis=1).mean()
    expected = unigrams.probability(percent / 100)
    assert abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / number) + 1e-3


def test_probability_by_hand() -> None:
    assert MinHash(bands=2, rows=1).probability(0.5) == 0.75
    assert FAMILY.probability(0.8) == pytest.approx(0.9236, abs=1e-4)


@settings(max_examples=50)
@given(st.lists(st.text("ab c中", max_size=40), max_size=12), st.integers(3, 9))
def test_a_signature_depends_on_its_text_alone(texts: list[str], block: int) -> None:
    together = FAMILY.signatures(texts)
    assert together.shape == (len(texts), 112)
    for text, row in zip(texts, together, strict=True):
        assert (FAMILY.signatures([text])[0] == row).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(minhash, "BLOCK", block)
        assert (FAMILY.signatures(texts) == together).all()


def test_texts_without_words() -> None:
    signatures = FAMILY.signatures(["", " .!", "word"])
    assert has_words(signatures).tolist() == [False, False, True]
    assert (signatures[:2] == minhash.EMPTY).all()


def test_keys_are_of_bands() -> None:
    signatures = np.tile(np.arange(112, dtype=np.uint32), (2, 1))
    signatures[1, 17] = 0  # row 1 of band 2
    keys = FAMILY.band_keys(signatures)
    assert keys.shape == (2, 14)
    assert np.flatnonzero(keys[0] != keys[1]).tolist() == [2]
    assert len(set(keys[0].tolist())) == 14


def test_a_minimum_is_the_minimum_of_the_permuted_hashes() -> None:
    texts = ["one two three four five six seven", "three four five six seven"]
    a, b = FAMILY.signatures(texts)
    # The second text's only n-gram is in the first: no number of the first is greater.
    assert (a <= b).all()
    assert 0 < (a == b).mean() < 1


def test_seeds_differ() -> None:
    text = "one two three four five six seven"
    one, two = (MinHash(seed=seed).signatures([text]) for seed in (1, 2))
    assert (one != two).all()


def test_signatures_never_change() -> None:
    """Files of them outlive the program that wrote them."""
    signatures = FAMILY.signatures(["one two three four five six"])
    assert signatures[0, :4].tolist() == [2590414921, 1274873906, 597783318, 3822794331]
    keys = FAMILY.band_keys(signatures)
    assert keys[0, :2].tolist() == [10199860423158348184, 52456227365421113]
