"""A batch as text: whole, with what is special apart, and harmless to a terminal and a page."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.tokenizer import Tokenizer
from qwen2.tokens import (
    Encoded,
    LongMixture,
    Origin,
    PackedLoader,
    Packing,
    Shards,
    WeightedLoader,
    by_kind,
    write_shards,
)
from qwen2.tokens.packing import NOTHING
from qwen2.tokens.show import Segment, segments, show_batch, show_document, visible
from qwen2.tokens.show_html import batch_page

BYTES = Tokenizer.from_ranks(
    {bytes([value]): value for value in range(256)},
    {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
)
TEXTS = [
    ("prose", "Grün is the tree."),
    ("code", "if a < b & c:\n\treturn '<script>alert(1)</script>'"),
    ("prose", "It ends with <|endoftext|>, spelt."),
    ("code", "\x1b[31mred\x1b[0m \u202e"),
] * 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    folder = tmp_path_factory.mktemp("show") / "shards"
    documents = [
        Encoded(kind, BYTES.encode(text), Origin(f"{kind}/{n}", f"<b>{n}", "en", "00000-00001", n))
        for n, (kind, text) in enumerate(TEXTS)
    ]
    write_shards(
        folder, documents, vocab_size=259, end_of_text=256, tokenizer="bytes", shard_tokens=100
    )
    return Shards(folder)


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
@pytest.mark.parametrize("how", ["plain", "weighted", "long"])
def test_what_is_shown_is_what_is_given_next(shards: Shards, how: str, packing: Packing) -> None:
    if how == "weighted":
        weights = {"prose": 0.7, "code": 0.3}
        loader: PackedLoader = WeightedLoader(by_kind(shards), weights, 24, 3, packing=packing)
    else:
        source = LongMixture(shards, 30, 0.9) if how == "long" else shards
        loader = PackedLoader(source, 24, 3, packing=packing)
    for _ in range(6):
        rows = show_batch(loader, BYTES)
        batch = next(loader)
        pieces = [piece for row in rows for piece in row]
        assert [piece.tokens for piece in pieces] == batch.lengths
        shown = [i for p in pieces for i in (p.ids or [-100] * p.tokens)]
        assert shown == batch.targets.tolist()
        for piece in pieces:
            if piece.document == NOTHING:
                assert piece.title.startswith("padding, ")
                continue
            kind, text = TEXTS[piece.document]
            whole = [*BYTES.encode(text), 256]
            assert piece.kind == kind
            assert piece.ids == whole[piece.start : piece.stop]
            assert piece.origin is not None
            assert piece.origin.id == f"{kind}/{piece.document}"


def test_a_document_in_words(shards: Shards) -> None:
    piece = show_document(shards, 2, BYTES)
    assert piece.title == "prose, document 2, all 35 tokens"
    assert piece.where_from == "prose/2 · <b>2 · en · decisions in 00000-00001, row 2"
    assert piece.segments == [(TEXTS[2][1], False), ("<|endoftext|>", True)]
    assert piece.as_json()["origin"]["part"] == "00000-00001"
    assert piece.as_json()["text"] == TEXTS[2][1] + "<|endoftext|>"


def test_a_cut_inside_a_character() -> None:
    assert segments([0xC3, 257, 0xBC, 0x61], BYTES) == [
        Segment("\ufffd", False),
        Segment("<|im_start|>", True),
        Segment("\ufffda", False),
    ]


@given(st.text(max_size=50))
def test_nothing_shown_rules_a_terminal(text: str) -> None:
    shown = visible(text)
    assert all(char.isprintable() or char in "\n\t" or ord(char) > 0x9F for char in shown)
    assert not {"\x1b", "\u202e", "\x9b", "\r"} & set(shown)
    if text.isascii() and text.isprintable():
        assert shown == text


class Words(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_all_of_the_text_and_no_tag_of_it(shards: Shards) -> None:
    loader = PackedLoader(shards, 64, 8, packing="best_fit")
    rows = show_batch(loader, BYTES)
    page = Words(batch_page("A <title>", rows, shards.index.kinds))
    ours = {
        "html",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "p",
        "span",
        "i",
        "div",
        "b",
        "br",
    }
    assert set(page.tags) <= ours | {"article", "header", "pre"}
    pieces = [piece for row in rows for piece in row]
    assert page.tags.count("article") == len(pieces)
    for piece in pieces:
        assert piece.title in page.text
        assert visible("".join(segment.text for segment in piece.segments)) in page.text
        assert piece.where_from in page.text
    assert "http" not in batch_page("x", rows, shards.index.kinds)
