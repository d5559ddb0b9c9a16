"""Ids to text, whole and one by one."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.tokenizer import Tokenizer

ANY_IDS = st.lists(st.integers(0, 151_645) | st.integers(0, 255), max_size=40)


@given(text=st.text())
def test_streaming_any_text_equals_decoding_it(qwen: Tokenizer, text: str) -> None:
    ids = qwen.encode(text)
    stream = qwen.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == qwen.decode(ids)
    assert "\ufffd" not in qwen.decode(ids) or "\ufffd" in text


@settings(max_examples=500)
@given(ids=ANY_IDS)
def test_streaming_any_ids_equals_decoding_them(qwen: Tokenizer, ids: list[int]) -> None:
    stream = qwen.stream()
    assert "".join(map(stream.push, ids)) + stream.finish() == qwen.decode(ids)
    assert qwen.decode_bytes(ids) == b"".join(qwen.decode_bytes([id_]) for id_ in ids)


def test_streaming_holds_back_split_characters(qwen: Tokenizer) -> None:
    ids = [qwen.ranks[bytes([byte])] for byte in "é漢😀".encode()]
    stream = qwen.stream()
    pushed = [stream.push(id_) for id_ in ids]
    assert pushed == ["", "é", "", "", "漢", "", "", "", "😀"]
    assert stream.finish() == ""
    assert (stream.push(ids[0]), stream.finish()) == ("", "\ufffd")


def test_decodes_bytes_that_are_no_text(qwen: Tokenizer) -> None:
    ids = [qwen.ranks[b"\xff"], *qwen.encode("a")]
    assert qwen.decode_bytes(ids) == b"\xffa"
    assert qwen.decode(ids) == "\ufffda"


def test_skipping_special_tokens_keeps_user_defined_ones(extended: Tokenizer) -> None:
    text = "<|im_start|>a<tool_call>b</tool_call><|im_end|>"
    ids = extended.encode(text, parse_special=True)
    assert extended.decode(ids) == text
    assert extended.decode(ids, skip_special=True) == "a<tool_call>b</tool_call>"
    stream = extended.stream(skip_special=True)
    assert "".join(map(stream.push, ids)) == "a<tool_call>b</tool_call>"


@pytest.mark.parametrize("bad", [151_646, 151_935, -1, 2**40])
def test_ids_without_text_are_named(qwen: Tokenizer, bad: int) -> None:
    with pytest.raises(UserError, match=f"token id {bad}: .* ids end at 151645, .* padding"):
        qwen.decode([785, bad])
    with pytest.raises(UserError, match=f"token id {bad}: "):
        qwen.stream().push(bad)
