"""A small vocabulary keeps every byte."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.remap import END_OF_TEXT, FIRST_BYTE, Remapping, most_used

WORDS = [b"ab", b"abc", b"cd", b"abcd", b" the", "\u6c49".encode()]
RANKS = {bytes([i]): i for i in range(256)} | {word: 256 + i for i, word in enumerate(WORDS)}
EOT = 262


def remapping(size: int, **used: int) -> Remapping:
    use = np.zeros(263)
    use[EOT] = 50
    for word, count in used.items():
        use[RANKS[word.encode()]] = count
    return most_used(RANKS, EOT, use, size)


def test_by_hand() -> None:
    """Room for two of three: ab and cd. abcd becomes ab cd; abc becomes ab c."""
    small = remapping(259, ab=9, cd=8, abcd=7)
    assert small.vocabulary[257:] == [b"ab", b"cd"]
    one, two = 257, 258
    ids = small.apply(np.array([RANKS[b"abcd"], RANKS[b"abc"], EOT, RANKS[b"ab"]]))
    assert ids.tolist() == [one, two, one, FIRST_BYTE + ord("c"), END_OF_TEXT, one]
    assert small.byte_lengths[RANKS[b"abcd"]] == 4
    assert small.byte_lengths[EOT] == 0


def test_a_character_without_a_token_becomes_its_bytes() -> None:
    small = remapping(257)
    han = "\u6c49".encode()
    ids = small.apply(np.array([RANKS[han]]))
    assert [id_ - FIRST_BYTE for id_ in ids.tolist()] == list(han)


def test_nothing_becomes_nothing() -> None:
    assert remapping(257).apply(np.array([], np.int64)).tolist() == []


@given(st.lists(st.integers(0, 262), max_size=60), st.integers(257, 263), st.integers(0, 99))
def test_bytes_stay(tokens: list[int], size: int, seed: int) -> None:
    use = np.random.default_rng(seed).integers(1, 9, 263).astype(float)
    small = most_used(RANKS, EOT, use, size)
    assert len(small.vocabulary) == size
    by_id = {id_: token for token, id_ in RANKS.items()}
    text = b"".join(by_id.get(token, b"") for token in tokens)
    ids = small.apply(np.array(tokens, np.int64))
    assert small.decode(ids) == text
    assert small.byte_lengths[tokens].sum() == len(text)
    assert (ids == END_OF_TEXT).sum() == tokens.count(EOT)
    assert ((ids >= 0) & (ids < size)).all()


def test_text_through_the_published_vocabulary() -> None:
    coder = Tokenizer.qwen2()
    text = "The report speaks of 数据, данные and code: x += 1\n" * 3
    ids = np.array(coder.encode(text))
    use = np.bincount(ids, minlength=coder.vocab_size).astype(float)
    small = most_used(coder.ranks, coder.end_of_text_id, use, 262)
    assert small.decode(small.apply(ids)) == text.encode()
    assert len(small.apply(ids)) > len(ids), "most tokens had no room"


def test_what_cannot_be() -> None:
    with pytest.raises(UserError, match="at least 257"):
        remapping(256)
    use = np.zeros(264)
    use[263] = 1  # <|im_start|>, say
    with pytest.raises(UserError, match="control token inside a text"):
        most_used(RANKS, EOT, use, 300)
