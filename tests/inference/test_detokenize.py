"""Text that is shown is never taken back, and stop strings may straddle tokens."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.inference.detokenize import TextStream
from qwen2.tokenizer import Tokenizer

BYTES = Tokenizer.from_ranks(
    {bytes([value]): value for value in range(256)},
    {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
)


def shown(text: str, stop: list[str]) -> tuple[str, list[str], bool]:
    """The whole text, the pieces as they came, and whether a stop string was met, byte by byte."""
    stream = TextStream(BYTES, stop)
    pieces = []
    for byte in text.encode():
        pieces.append(stream.push(byte))
        if stream.stopped:
            break
    pieces.append(stream.finish())
    return stream.text, pieces, stream.stopped


def test_a_stop_string_that_straddles_tokens() -> None:
    assert shown("one END two", ["END"]) == (
        "one ",
        ["o", "n", "e", " ", "", "", "", ""],
        True,
    )


def test_a_beginning_that_is_no_stop_string_is_given_back() -> None:
    assert shown("ENEND", ["ENDE"])[0] == "ENEND"
    assert shown("aab", ["ab"])[0] == "a"


def test_the_earliest_of_several_ends_the_text() -> None:
    assert shown("abcdef", ["ef", "cd", "zz"])[0] == "ab"


@given(text=st.text(alphabet="abé漢🙂", max_size=30))
def test_without_stop_all_text_comes_out_whole(text: str) -> None:
    whole, pieces, stopped = shown(text, [])
    assert whole == "".join(pieces) == text
    assert not stopped


@given(
    text=st.text(alphabet="abé", max_size=20),
    stop=st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3),
)
@settings(max_examples=300)
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str]) -> None:
    whole, pieces, stopped = shown(text, stop)
    assert whole == "".join(pieces)
    # What ends first is what a stream can know first; of two that end together, the longer.
    ends = [(text.find(s) + len(s), text.find(s)) for s in stop if s in text]
    assert stopped == bool(ends)
    assert whole == (text[: min(ends)[1]] if ends else text)


@pytest.mark.parametrize("cut", range(1, 4))
def test_half_a_character_waits(cut: int) -> None:
    stream = TextStream(BYTES)
    data = "🙂".encode()
    assert [stream.push(byte) for byte in data[:cut]] == [""] * cut
    assert "".join(stream.push(byte) for byte in data[cut:]) == "🙂"
