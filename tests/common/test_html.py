"""A page: its own rules outweigh the common ones, and its title can't break it."""

from __future__ import annotations

from qwen2.common.html import STYLE, html_page


def test_a_page() -> None:
    page = html_page("a < b", ["<h1>one</h1>", "<p>two</p>"], "h1{color:red}")
    assert page.startswith("<!doctype html>")
    assert "<title>a &lt; b</title>" in page
    assert page.index(STYLE) < page.index("h1{color:red}")
    assert page.endswith("<body><h1>one</h1><p>two</p></body></html>\n")
    assert "http" not in page
