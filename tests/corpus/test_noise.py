"""A line loses the same noise by its own expression as by that of everything."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from qwen2.corpus.noise import expression, without_noise

PIECES = ("http://a.b", "WWW.x", "www.", "ſ://y", "k@l.m", "@", "&amp;", "<b>", "</a\n>", "a_1",
          "٣", "1", "_", "«", "日本", "\n", " ", "\u2028", "\x0b", ".", "ab", "İ")  # fmt: skip


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=4)).map("".join))
@example("a@b.c<d\n>&e;www.f")
def test_only_what_a_line_can_hold_is_looked_for(text: str) -> None:
    of_all = expression(True, True, True, True).sub(" ", text)
    assert "\n".join(map(without_noise, text.split("\n"))) == of_all


@pytest.mark.parametrize(
    ("line", "left"),
    [
        ("See https://example.org/the/english now", "See   now"),
        ("write to a.b@c.de today", "write to   today"),
        ("x1 and <b class='y'>Wort</b> &amp; 12 %", "  and  Wort       "),
        ("plain words stay.", "plain words stay."),
    ],
)
def test_noise_goes(line: str, left: str) -> None:
    assert without_noise(line).split() == left.split()
    assert without_noise(line).startswith(left[:1])
