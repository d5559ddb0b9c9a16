import gzip
import json
import tempfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reading import read, source

from qwen2.common.errors import UserError
from qwen2.corpus import Document, read_documents, write_documents
from qwen2.corpus.readers import base

TEXTS = ["eins zwei", "日本語 text\n", 'quo"te']
RECORDS = [{"text": t, "url": f"u{i}", "n": [i, None]} for i, t in enumerate(TEXTS)]
LINES = "".join(json.dumps(record) + "\n" for record in RECORDS).encode()


@pytest.mark.parametrize("suffix", ["jsonl", "json.gz", "ndjson.zst"])
def test_plain_and_packed(tmp_path: Path, suffix: str) -> None:
    data = {"gz": gzip.compress, "zst": lambda d: pa.compress(d, "zstd", asbytes=True)}
    packed = data.get(suffix.rpartition(".")[2], bytes)(LINES)
    (tmp_path / f"a.{suffix}").write_bytes(packed)
    documents, skipped = read(source("jsonl", tmp_path, licence="MIT", language="de"))
    assert not skipped
    assert documents == [
        Document(
            text, f"s/a.{suffix}#{i + 1}", str(tmp_path / f"a.{suffix}"), "web", "MIT", "de",
            metadata={"url": f"u{i}", "n": [i, None]},
        )
        for i, text in enumerate(TEXTS)
    ]  # fmt: skip


def test_remote() -> None:
    fsspec.filesystem("memory").pipe("/jsonl/d/a.jsonl.gz", gzip.compress(LINES))
    documents, _ = read(source("jsonl", "memory://jsonl"))
    assert [d.id for d in documents] == [f"s/d/a.jsonl.gz#{i}" for i in (1, 2, 3)]


def test_fields(tmp_path: Path) -> None:
    rows = [
        {"content": "a", "key": "k#1", "lang": "fr", "spdx": "MIT", "repo": "r", "x": 1, "y": 2},
        {"content": "b", "key": 7, "lang": None, "x": 3},
        {"content": "c", "key": 7},
        {"content": "d"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    fields = {
        "text": "content",
        "id": "key",
        "language": "lang",
        "licence": "spdx",
        "group": "repo",
    }
    reader = source("jsonl", tmp_path, fields=fields, metadata=["x", "z"], language="en")
    documents, skipped = read(reader)
    assert [(d.id, d.language, d.licence, d.group, d.metadata) for d in documents] == [
        ("s/a.jsonl#k#1", "fr", "MIT", "r", {"x": 1}),
        ("s/a.jsonl#7", "en", None, None, {"x": 3}),
    ]
    assert [s.reason for s in skipped] == ["id came before in this file", "no id in field 'key'"]


BAD = {
    b"{": "not JSON",
    b'{"text": "caf\xe9"}': "not UTF-8",
    b"[1]": "not a JSON object",
    b'{"txt": "a"}': "no field 'text'",
    b'{"text": 1}': "text is no string",
    b'{"text": " \\n"}': "empty text",
    b'{"text": "a\\u0000"}': "text holds NUL",
    b"\0\0\0": "not JSON",
    b'{"text": "%s"}' % (b"x" * 300): "longer than 200 bytes",
    b"[" * 190: "JSON beyond Python's limits",
}


def test_what_is_skipped_says_why_and_where(tmp_path: Path) -> None:
    good = b'\xef\xbb\xbf{"text": "good"}'
    data, offset = good + b"\r\n\n", len(good) + 3
    places = []
    for number, line in enumerate(BAD, 3):
        places.append(f"{tmp_path}/a.jsonl, line {number}, byte {offset}")
        data += line + b"\n"
        offset += len(line) + 1
    (tmp_path / "a.jsonl").write_bytes(data + b'{"text": "last"}')
    documents, skipped = read(source("jsonl", tmp_path, max_bytes=200))
    assert [d.text for d in documents] == ["good", "last"]
    reasons = [s.reason for s in skipped]
    assert reasons[:-1] == list(BAD.values())[:-1]
    assert reasons[-1] in (list(BAD.values())[-1], "not JSON")  # as deep as this Python goes
    assert [s.source for s in skipped] == places
    assert all(s.excerpt.isprintable() and len(s.excerpt) <= 170 for s in skipped)
    assert "caf\\xe9" in skipped[1].excerpt


SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
VALUE = st.recursive(SCALAR, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(), v))
GOOD = st.builds(
    lambda text, rest, ascii: json.dumps({**rest, "text": text}, ensure_ascii=ascii).encode(),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), VALUE, max_size=2),
    st.booleans(),
).filter(lambda line: b"\n" not in line)
ANY = st.binary(max_size=30).map(lambda line: line.replace(b"\n", b" "))


def parsed(line: bytes) -> dict[str, object] | None:
    try:
        record = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    text = record.get("text") if isinstance(record, dict) else None
    return record if isinstance(text, str) and text.strip() and "\0" not in text else None


@settings(max_examples=40)
@given(st.lists(GOOD | ANY, max_size=8), st.booleans())
@example([b'{"text": "\\ud800 \\ud83d\\ude00", "m": "\\udfff\\u0000"}'], False)
@example([b'{"text": "a", "big": ' + b"9" * 5000 + b"}", b'{"text": "n", "x": NaN}'], True)
def test_any_bytes(
    tmp_path_factory: pytest.TempPathFactory, written: list[bytes], is_packed: bool
) -> None:
    folder = tmp_path_factory.mktemp("any")
    data = b"\n".join(written).removeprefix(b"\xef\xbb\xbf")
    path = folder / ("a.jsonl.gz" if is_packed else "a.jsonl")
    path.write_bytes(gzip.compress(data) if is_packed else data)
    documents, skipped = read(source("jsonl", folder))
    nonempty = [line for line in data.split(b"\n") if line.strip()]
    assert len(documents) + len(skipped) == len(nonempty)
    good = [record for line in nonempty if (record := parsed(line)) is not None]
    assert [d.text for d in documents] == [record["text"] for record in good]
    for document, record in zip(documents, good, strict=True):
        expected = {k: v for k, v in record.items() if k != "text"}
        both = json.dumps([document.metadata, expected], ensure_ascii=False)
        if "\\u" not in both:  # nothing to mend
            assert repr(document.metadata) == repr(expected)  # NaN is not equal to itself
    kept = [d for d in documents if d.text.isascii()]
    write_documents(folder / "x.parquet", kept)  # metadata can be stored whatever they held
    assert sum(1 for _ in read_documents(folder / "x.parquet")) == len(kept)


def test_truncated_gzip_keeps_what_came_before(tmp_path: Path) -> None:
    many = b"".join(b'{"text": "document %d"}\n' % i for i in range(5_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(many)[:-1000])
    (tmp_path / "b.jsonl").write_bytes(LINES)
    documents, skipped = read(source("jsonl", tmp_path))
    number = len(documents) - 3
    assert 1_000 < number < 5_000
    assert [d.text for d in documents[:number]] == [f"document {i}" for i in range(number)]
    assert [d.text for d in documents[number:]] == TEXTS
    assert [s.reason for s in skipped] in (
        ["not JSON", "gzip stream cut short"], ["gzip stream cut short"],
    )  # fmt: skip
    assert "byte" in skipped[-1].source


def test_a_file_that_went_or_may_not_be_read_is_skipped(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(LINES)
    reader = source("jsonl", tmp_path)
    (split,) = reader.splits()
    (tmp_path / "a.jsonl").unlink()
    found = list(reader.read(split))
    assert [getattr(thing, "reason", None) for thing in found] == ["no such file", None, None, None]


def test_splits_are_by_size_and_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "SPLIT_BYTES", 2 * len(LINES))
    for name in ("d", "b", "a", "c", "e"):
        (tmp_path / f"{name}.jsonl").write_bytes(LINES * (3 if name == "c" else 1))
    splits = source("jsonl", tmp_path).splits()
    assert [[place.name[0] for place in split.files] for split in splits] == [
        ["a", "b"], ["c"], ["c"], ["d", "e"],
    ]  # fmt: skip
    assert [split.number for split in splits] == [0, 1, 2, 3]


def test_a_small_source_has_work_for_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "LEAST_SPLIT", 2 * len(LINES))
    for number in range(128):
        (tmp_path / f"{number:03d}.jsonl").write_bytes(LINES)
    splits = source("jsonl", tmp_path).splits()
    assert {len(split.files) for split in splits} == {4}  # a 32nd
    for number in range(16, 128):
        (tmp_path / f"{number:03d}.jsonl").unlink()
    splits = source("jsonl", tmp_path).splits()
    assert {len(split.files) for split in splits} == {2}  # no less than the least


def test_limits_are_exact(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / f"{name}.jsonl").write_bytes(LINES + b"broken\n")
    documents, _ = read(source("jsonl", tmp_path, limit={"documents": 5}))
    assert len(documents) == 5
    size = sum(len(text.encode()) for text in TEXTS)
    documents, _ = read(source("jsonl", tmp_path, limit={"megabytes": (2 * size + 1) / 1e6}))
    assert len(documents) == 6
    assert len({d.source for d in documents}) == 2
    with pytest.raises(ValidationError, match="give documents or megabytes"):
        source("jsonl", tmp_path, limit={})


def test_settings_are_checked(tmp_path: Path) -> None:
    for settings_, message in (
        ({"txt": "a"}, "Extra inputs"),
        ({"name": "a/b"}, "pattern"),
        ({"max_bytes": 0}, "greater than 0"),
    ):
        with pytest.raises(ValidationError, match=message):
            source("jsonl", tmp_path, **settings_)
    with pytest.raises(ValidationError, match="at least 1"):
        source("jsonl")
    with pytest.raises(UserError, match="no such file or folder"):
        source("jsonl", tmp_path / "none").splits()


PIECES = st.lists(
    st.sampled_from([LINES, b"\n", b"\r\n", b"{", b'{"text": "' + b"x" * 400 + b'"}\n', b"[]\n"])
)


@settings(max_examples=60)
@given(st.lists(PIECES, min_size=1, max_size=3), st.integers(1, 900))
@example([[b"\n\n\n"], [LINES]], 1)
def test_a_large_file_is_cut_and_reads_as_in_one_piece(files: list[list[bytes]], most: int) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        contents = [b"".join(pieces) for pieces in files]
        for number, content in enumerate(contents):
            (Path(folder) / f"{number}.jsonl").write_bytes(content)
        reader = source("jsonl", folder, max_bytes=300)
        whole = read(reader)
        assert len(reader.splits()) == 1
        patch.setattr(base, "SPLIT_BYTES", most)
        assert read(reader) == whole
        for split in reader.splits():
            size = sum(place.size for place in split.files)
            assert split.range or size <= most
            if split.range:
                content = contents[int(split.files[0].name[0])]
                longest = max(map(len, content.split(b"\n"))) + 1
                assert split.range.last - split.range.first < most + longest
                assert len(split.files) == 1


def test_what_is_packed_or_remote_is_not_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base, "LEAST_SPLIT", 10)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(LINES))
    fsspec.filesystem("memory").pipe("/uncut/a.jsonl", LINES)
    for path in (tmp_path, "memory://uncut"):
        assert [split.range for split in source("jsonl", path).splits()] == [None]
    (tmp_path / "b.jsonl").write_bytes(LINES)
    assert len(source("jsonl", tmp_path).splits()) == 4
    (one,) = source("jsonl", tmp_path, limit={"documents": 2}).splits()
    assert one.range is None
