import gzip
import io
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.corpus.readers import streams
from qwen2.corpus.readers.streams import FileError, blocks, excerpt, lines, open_file, read_whole

LIMIT = 1 << 20


@given(st.binary(max_size=60), st.integers(1, 9), st.integers(1, 20))
def test_lines_are_those_of_the_whole_however_cut(data: bytes, size: int, limit: int) -> None:
    data = data.replace(b"\1", b"\n")
    cut = (data[i : i + size] for i in range(0, len(data), size))
    expected, offset = [], 0
    for number, line in enumerate(data.split(b"\n"), 1):
        if line.strip() or len(line) > limit:
            expected.append((number, offset, line, len(line) <= limit))
        offset += len(line) + 1
    found = list(lines(cut, limit))
    assert [(line.number, line.offset, line.is_whole) for line in found] == [
        (number, offset, is_whole) for number, offset, _, is_whole in expected
    ]
    for line, (_, _, whole, _) in zip(found, expected, strict=True):
        assert line.data == whole if line.is_whole else whole.startswith(line.data)


def test_a_long_line_is_not_held() -> None:
    def stream() -> Iterator[bytes]:
        yield b"a\n"
        for _ in range(400):
            yield b"x" * (1 << 18)  # 100 MB in all
        yield b"\nb"

    tracemalloc.start()
    found = list(lines(stream(), 1000))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [(line.number, line.is_whole) for line in found] == [(1, True), (2, False), (3, True)]
    assert found[2].offset == 2 + 400 * (1 << 18) + 1
    assert peak < 4 << 20


def packed(data: bytes, suffix: str) -> bytes:
    return gzip.compress(data) if suffix == ".gz" else pa.compress(data, "zstd", asbytes=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_packed_files(tmp_path: Path, suffix: str) -> None:
    data = os.urandom(300_000) + b"z" * 300_000
    path = tmp_path / f"a{suffix}"
    path.write_bytes(packed(data, suffix) + packed(b"second", suffix))
    assert read_whole(str(path), LIMIT) == data + b"second"
    assert all(len(block) <= streams.UNPACKED for block in blocks(str(path)))
    with pytest.raises(FileError, match="longer than 600005 bytes"):
        read_whole(str(path), 600_005)
    path.write_bytes(packed(b"", suffix))
    assert read_whole(str(path), LIMIT) == b""


def until_it_breaks(path: Path, reason: str) -> bytes:
    kept = bytearray()

    def keep() -> None:
        for block in blocks(str(path)):
            kept.extend(block)

    with pytest.raises(FileError, match=reason):
        keep()
    return bytes(kept)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_comes_before_a_damage_is_kept(tmp_path: Path, suffix: str) -> None:
    data = os.urandom(500_000)
    whole = packed(data, suffix)
    path = tmp_path / f"a{suffix}"
    for changed, reason in (
        (whole[:-100_000], "cut short"),
        (whole[:250_000] + b"\xff" * 100 + whole[250_100:], "damaged"),
        (b"not packed at all", "damaged"),
    ):
        if suffix == ".zst" and reason == "damaged" and changed != b"not packed at all":
            continue  # of zstd without checksums such a damage cannot be told from text
        path.write_bytes(changed)
        kept = until_it_breaks(path, reason)
        if reason == "cut short":
            assert data.startswith(kept)
            assert len(kept) > 200_000


def test_a_truncated_gzip_file_loses_nothing_that_is_there(tmp_path: Path) -> None:
    data = b"".join(b"%d\n" % i for i in range(100_000))
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(data)[:-8])  # only the checksum is gone
    assert until_it_breaks(path, "gzip stream cut short") == data


def test_padding_behind_a_gzip_file_is_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(gzip.compress(b"a") + b"\0" * 512 + gzip.compress(b"b") + b"\0")
    assert read_whole(str(path), 9) == b"ab"


def test_excerpt() -> None:
    assert excerpt("a\x07b\ud800\n") == "a b\\ud800 "
    assert excerpt(b"x" * 100 + b"\xff" + b"y" * 500, 100) == "x" * 40 + "\\xff" + "y" * 119


class Breaking(MemoryFileSystem):
    """A remote store whose connection is lost."""

    protocol = "breaking"
    store: dict[str, object] = {}  # noqa: RUF012

    def open(self, path: str, mode: str = "rb", **settings: object) -> io.BytesIO:
        raise ConnectionResetError("connection\nreset")


def test_a_lost_connection_stops_the_run_and_blames_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(_registry, "breaking", Breaking)
    for read in (read_whole, lambda url, _: open_file(url)):
        with pytest.raises(UserError, match="connection reset; start again to go on from here"):
            read("breaking://a.jsonl", LIMIT)
