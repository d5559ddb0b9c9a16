import gzip
import io
from pathlib import Path

import fsspec
import pytest
from reading import read, source

from qwen2.corpus.readers.warc_frames import Broken, Record, records

SENTENCE = "The quick brown fox jumps over the lazy dog near the bank of the river. "


def record(kind: str, url: str, block: bytes) -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {url}\r\n"
        f"WARC-Date: 2024-01-02T03:04:05Z\r\nWARC-Record-ID: <urn:uuid:0>\r\n"
        f"Content-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def response(url: str, body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    head = "\r\n".join([f"HTTP/1.1 {status}", *(headers or ["Content-Type: text/html"]), "", ""])
    return record("response", url, head.encode() + body)


def page(words: str) -> bytes:
    return f"<html><body><h1>{words}</h1><p>{SENTENCE * 4}</p></body></html>".encode()


def chunked(data: bytes) -> bytes:
    half = len(data) // 2
    parts = (data[:half], data[half:], b"")
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)


RECORDS = [
    record("warcinfo", "", b"software: x\r\n"),
    record("request", "http://a/", b"GET / HTTP/1.1\r\n\r\n"),
    response("http://a/", page("Zürich"), "Content-Type: text/html; charset=UTF-8"),
    response(
        "http://b/", chunked(gzip.compress(page("Packed"))), "Content-Type: text/html",
        "Transfer-Encoding: chunked", "Content-Encoding: gzip",
    ),
    response("http://c/", b"gone", status="404 Not Found"),
    response("http://d/x.png", b"\x89PNG", "Content-Type: image/png"),
    response("http://e/", "schön".encode("latin-1"), "Content-Type: text/plain; charset=latin-1"),
    record("conversion", "http://f/", b"Ein Text."),
    response("http://g/", b"<p>" + b"x" * 5000),
]  # fmt: skip
LIMIT = 4000


def offsets(parts: list[bytes]) -> list[int]:
    return [sum(map(len, parts[:i])) for i in range(len(parts))]


@pytest.mark.parametrize("form", ["plain", "members", "one member", "remote"])
def test_records(tmp_path: Path, form: str) -> None:
    parts = RECORDS if form in ("plain", "one member") else [gzip.compress(r) for r in RECORDS]
    data = gzip.compress(b"".join(parts)) if form == "one member" else b"".join(parts)
    path = str(tmp_path / ("a.warc" if form == "plain" else "a.warc.gz"))
    if form == "remote":
        path = "memory:///warc/a.warc.gz"
    fs, inside = fsspec.url_to_fs(path)
    fs.pipe(inside, data)
    documents, skipped = read(source("warc", path, max_bytes=LIMIT, favour="everything"))
    at = [f"0+{o}" if form == "one member" else str(o) for o in offsets(parts)]
    assert [d.id.rpartition("#")[2] for d in documents] == [at[2], at[3], at[6], at[7]]
    assert [d.text.split("\n")[0] for d in documents] == [
        "# Zürich", "# Packed", "schön", "Ein Text.",
    ]  # fmt: skip
    assert documents[0].metadata == {"url": "http://a/", "date": "2024-01-02T03:04:05Z"}
    assert documents[0].source == path
    assert [(s.reason, s.source.rpartition(" ")[2]) for s in skipped] == [
        ("HTTP status 404", at[4]),
        ("neither HTML nor plain text", at[5]),
        (f"longer than {LIMIT} bytes", at[8]),
    ]


def frames(data: bytes, is_packed: bool) -> list[tuple[str, str]]:
    found = records(io.BytesIO(data), is_packed, 1 << 20)
    return [(r.where, "record" if isinstance(r, Record) else r.reason) for r in found]


def test_reading_goes_on_behind_a_damaged_member() -> None:
    members = [gzip.compress(response(f"http://{i}/", page(f"Page {i}"))) for i in range(4)]
    at = [str(offset) for offset in offsets(members)]
    members[1] = members[1][:60] + b"\xff" * 20 + members[1][80:]
    assert frames(b"".join(members), True) == [
        (at[0], "record"), (at[1], "damaged gzip stream"), (at[2], "record"), (at[3], "record"),
    ]  # fmt: skip


def test_a_record_that_is_cut_short_is_not_given() -> None:
    plain = [response(f"http://{i}/", page(f"Page {i}")) for i in range(2)]
    for data, is_packed, reason in (
        (b"".join(plain)[:-200], False, "record cut short"),
        (b"".join(map(gzip.compress, plain))[:-60], True, "gzip stream cut short"),
    ):
        (_, first), (_, second) = frames(data, is_packed)
        assert (first, second) == ("record", reason)


def test_a_broken_header_costs_its_record_only() -> None:
    plain = [response(f"http://{i}/", page(f"Page {i}")) for i in range(3)]
    broken = plain[1].replace(b"Content-Length", b"Content-Lxngth")
    at = offsets([plain[0], broken, plain[2]])
    assert frames(plain[0] + broken + plain[2], False) == [
        (str(at[0]), "record"),
        (str(at[1]), "no header of a WARC record"),
        (str(at[2]), "record"),
    ]
    (found,) = records(io.BytesIO(b"no archive\nat all"), False, 99)
    assert isinstance(found, Broken)
