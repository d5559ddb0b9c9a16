from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.common.files import verify_folder
from qwen2.corpus import Document, join, text_digest
from qwen2.corpus import paragraphs as module
from qwen2.corpus.paragraphs import (
    REPEATED,
    ParagraphRule,
    find_repeated,
    paragraphs,
    without_repeated,
    write_paragraphs,
)

RULE = ParagraphRule(shortest=5, remainder=8)


def priority(document: Document) -> int:
    return int(document.id[0] == "p")


def write(
    folder: Path, name: str, documents: Sequence[Document], parts: int, rule: ParagraphRule
) -> list[Path]:
    paths = []
    for i in range(parts):
        low, high = (len(documents) * j // parts for j in (i, i + 1))
        paths.append(folder / f"{name}{i}")
        write_paragraphs(paths[-1], documents[low:high], rule, priority)
    return paths


def run(
    folder: Path,
    documents: Sequence[Document],
    parts: int = 1,
    older: Sequence[Document] = (),
    rule: ParagraphRule = RULE,
) -> dict[str, str]:
    """The texts that stay, by id."""
    folder.mkdir()
    files = write(folder, "new", documents, parts, rule)
    old = write(folder, "old", older, 1, rule) if older else []
    find_repeated(folder / "out", files, rule, old)
    assert verify_folder(folder / "out") is None
    stays: dict[str, str] = {}
    dropped = Counter[str]()
    for i in range(parts):
        low, high = (len(documents) * j // parts for j in (i, i + 1))
        kept = without_repeated(documents[low:high], folder / "out", i, rule, dropped)
        stays |= {d.id: d.text for d in kept}
    assert dropped.total() == len(documents) - len(stays)
    return stays


def documents(*texts: str, names: str = "abcdefgh") -> list[Document]:
    return [Document(text, name, "s", "k") for text, name in zip(texts, names, strict=False)]


@given(st.text("ab \n\t", max_size=30))
def test_paragraphs_are_the_text(text: str) -> None:
    pieces = paragraphs(text)
    assert "".join(pieces) == text
    assert all(pieces)
    assert all("\n\n" not in piece.strip() for piece in pieces)


def test_paragraphs_by_hand() -> None:
    text = "one\ntwo\n \n\n  three\n\nfour"
    assert paragraphs(text) == ["one\ntwo\n \n\n", "  three\n\n", "four"]


def test_stays_in_the_first_document_as_often_as_it_is_there(tmp_path: Path) -> None:
    text = "chorus one\n\nchorus two\n\nchorus one"
    stays = run(tmp_path / "a", documents(text, "chorus  one\n\nsomething else\n"))
    assert stays == {"a": text, "b": "something else\n"}
    table = pq.read_table(tmp_path / "a/out" / REPEATED).to_pylist()
    assert table == [{"id": "b", "paragraph": 0, "stays_in": "a", "older": False}]


def test_short_ones_stay_and_what_is_too_little_goes(tmp_path: Path) -> None:
    given_ = documents("Usage\n\nsame text", "Usag\n\nsame text", "Usag\n\nsame text\n\nother text")
    assert run(tmp_path / "a", given_) == {
        "a": "Usage\n\nsame text",
        "c": "Usag\n\nother text",
    }
    # Short from the beginning, but nothing was taken from it.
    assert run(tmp_path / "b", documents("tiny")) == {"a": "tiny"}


def test_priority_comes_before_the_id_and_the_older_set_before_both(tmp_path: Path) -> None:
    given_ = documents("same text\n\nfirst own", "same text\n\nsecond own", names="ap")
    assert run(tmp_path / "a", given_)["a"] == "first own"
    older = documents("same text", names="z")
    assert run(tmp_path / "b", given_, older=older) == {"a": "first own", "p": "second own"}
    table = pq.read_table(tmp_path / "b/out" / REPEATED).to_pylist()
    assert [(row["stays_in"], row["older"]) for row in table] == [("z", True)] * 2


def random_corpus(seed: int) -> list[Document]:
    r = random.Random(seed)
    names = [f"{r.choice('pq')}{i:02d}" for i in range(40)]
    texts = [
        "\n\n".join(f"paragraph {r.randrange(60)}" for _ in range(r.randrange(1, 8))) for _ in names
    ]
    return documents(*texts, names=names)  # type: ignore[arg-type]


def reference(given_: Sequence[Document]) -> dict[str, str]:
    owner: dict[bytes, str] = {}
    for document in sorted(given_, key=lambda d: (-priority(d), d.id)):
        for piece in paragraphs(document.text):
            owner.setdefault(text_digest(piece), document.id)
    stays = {}
    for document in given_:
        own = [p for p in paragraphs(document.text) if owner[text_digest(p)] == document.id]
        if text := "".join(own).rstrip():
            stays[document.id] = text
    return stays


def test_equals_a_plain_reference_in_any_order_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_ = random_corpus(0)
    expected = reference(given_)
    assert 5 < len(expected) < 40
    assert run(tmp_path / "a", given_) == expected
    assert run(tmp_path / "b", random.Random(1).sample(given_, 40), 3) == expected
    monkeypatch.setattr(join, "RECORDS", 7)
    monkeypatch.setattr(module, "CHUNK", 3)
    monkeypatch.setattr("qwen2.corpus.sketches.BATCH_DOCUMENTS", 3)
    assert run(tmp_path / "c", given_, 4) == expected


def test_a_second_run_removes_nothing(tmp_path: Path) -> None:
    stays = run(tmp_path / "a", random_corpus(2))
    again = [Document(text, i, "s", "k") for i, text in stays.items()]
    assert run(tmp_path / "b", again) == stays


def test_nothing_and_files_of_another_rule(tmp_path: Path) -> None:
    assert run(tmp_path / "a", []) == {}
    with pytest.raises(UserError, match="new0: made by other settings"):
        find_repeated(tmp_path / "out", [tmp_path / "a/new0"], ParagraphRule(shortest=9))
