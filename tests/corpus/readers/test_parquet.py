import datetime
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read, source

from qwen2.corpus.readers import base
from qwen2.corpus.readers.base import Range

ROWS = {
    "text": [f"document {i}" for i in range(10)],
    "url": [f"u{i}" for i in range(10)],
    "day": [datetime.date(2024, 1, i + 1) for i in range(10)],
    "picture": [b"\xff"] * 10,
    "deep": [{"a": [i], "b": b"\0"} for i in range(10)],
}


def write(path: Path, rows: dict[str, list[object]] = ROWS, **settings: object) -> Path:  # type: ignore[assignment]
    pq.write_table(pa.table(rows), path, row_group_size=3, compression="zstd", **settings)
    return path


def test_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet")
    documents, skipped = read(source("parquet", tmp_path))
    assert not skipped
    assert [(d.id, d.text, d.source) for d in documents] == [
        (f"s/a.parquet#{i}", f"document {i}", str(path)) for i in range(10)
    ]
    expected = {"url": "u4", "day": "2024-01-05", "deep": {"a": [4], "b": None}}
    assert documents[4].metadata == expected
    documents, _ = read(source("parquet", tmp_path, metadata=["url"], fields={"id": "url"}))
    assert (documents[4].id, documents[4].metadata) == ("s/a.parquet#u4", {"url": "u4"})


def test_remote(tmp_path: Path) -> None:
    data = write(tmp_path / "a.parquet").read_bytes()
    fsspec.filesystem("memory").pipe("/parquet/b/a.parquet", data)
    documents, _ = read(source("parquet", "memory://parquet/*"))
    assert [d.id for d in documents] == [f"s/b/a.parquet#{i}" for i in range(10)]


def test_a_large_file_is_cut_by_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet")
    write(tmp_path / "b.parquet")
    whole, _ = read(source("parquet", path))
    monkeypatch.setattr(base, "LEAST_SPLIT", path.stat().st_size * 7 // 10)
    splits = source("parquet", tmp_path).splits()
    assert [(s.number, s.files[0].name, s.range) for s in splits] == [
        (0, "a.parquet", Range(first=0, last=2)),
        (1, "a.parquet", Range(first=2, last=4, records=6)),
        (2, "b.parquet", Range(first=0, last=2)),
        (3, "b.parquet", Range(first=2, last=4, records=6)),
    ]
    cut, _ = read(source("parquet", path))
    assert cut == whole


def test_a_damaged_row_group_is_skipped_and_the_next_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", write_page_checksum=True)
    start = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start + 20 : start + 40] = b"\xff" * 20
    path.write_bytes(data)
    documents, skipped = read(source("parquet", path))
    assert [d.id[-1] for d in documents] == list("0126789")
    assert [s.source for s in skipped] == [f"{path}, rows 3 to 5 (row group 1)"]
    assert skipped[0].reason == "damaged Parquet file"
    assert skipped[0].excerpt


def test_damaged_files_are_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "c.parquet")
    (tmp_path / "a.parquet").write_bytes((tmp_path / "c.parquet").read_bytes()[:-10])
    (tmp_path / "b.parquet").write_bytes(b"")
    pq.write_table(pa.table({"txt": ["a"]}), tmp_path / "d.parquet")
    for size in (base.LEAST_SPLIT, 100):  # also where a footer is read before
        monkeypatch.setattr(base, "LEAST_SPLIT", size)
        documents, skipped = read(source("parquet", tmp_path))
        assert len(documents) == 10
        assert [(Path(s.source).name, s.reason) for s in skipped] == [
            ("a.parquet", "damaged Parquet file"),
            ("b.parquet", "damaged Parquet file"),
            ("d.parquet", "no field 'text'"),
        ]
        assert skipped[2].excerpt == "txt"


def test_a_bad_row_costs_no_other(tmp_path: Path) -> None:
    values = pa.array([b"good", b"caf\xe9", None, b"", b"also"], pa.binary())
    text = pa.Array.from_buffers(pa.string(), 5, values.buffers(), values.null_count)
    pq.write_table(pa.table({"text": text}), tmp_path / "a.parquet")
    documents, skipped = read(source("parquet", tmp_path))
    assert [(d.id, d.text) for d in documents] == [
        ("s/a.parquet#0", "good"), ("s/a.parquet#4", "also"),
    ]  # fmt: skip
    assert [(s.reason, s.source.rpartition(", ")[2]) for s in skipped] == [
        ("not UTF-8", "row 1"), ("text is no string", "row 2"), ("empty text", "row 3"),
    ]  # fmt: skip
