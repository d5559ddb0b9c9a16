"""Web archives: .warc and .warc.gz, and Common Crawl's .wet files of extracted text.

HTML that a server gave (`response`, status 200) goes through trafilatura; `conversion` records and
responses of plain text are texts already. Other kinds of records (requests, metadata) say how a
page was fetched and are passed over; every other response is skipped with its reason.

An id has the offset of the record's gzip member in the file, as indexes of archives do. Where
records begin and end is found by `warc_frames`, and what is in one by warcio (Apache-2.0): of whole
files, it gives a truncated page as if it were whole and stops at the first damaged member.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from qwen2.common.errors import UserError
from qwen2.corpus.files import Found
from qwen2.corpus.readers.base import Split
from qwen2.corpus.readers.html import PageReader, decode_page
from qwen2.corpus.readers.places import Place
from qwen2.corpus.readers.streams import open_file
from qwen2.corpus.readers.warc_frames import Record, records

HTML = ("text/html", "application/xhtml+xml")
CHARSET = re.compile(r"""(?i)charset\s*=\s*["']?\s*([\w:.-]+)""")
OK = "200"


class WarcSource(PageReader):
    """Files of web archives."""

    format: Literal["warc"]

    SUFFIXES: ClassVar[tuple[str, ...]] = (".warc", ".wet")

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        with open_file(place.url) as file:
            for record in records(file, place.url.endswith(".gz"), self.max_bytes):
                where = f", offset {record.where}"
                if isinstance(record, Record):
                    yield self._page(place, record, where)
                else:
                    yield self.skipped(place, record.reason, where)

    def _page(self, place: Place, record: Record, where: str) -> Found:
        iterator = _warcio()(io.BytesIO(record.data + b"\r\n\r\n"))
        try:
            parsed = next(iterator)
            data = parsed.content_stream().read(self.max_bytes + 1)
        except Exception as error:  # warcio lets through what its parts raise
            reason = f"damaged record: {type(error).__name__}"
            return self.skipped(place, reason, where, record.data)
        headers = parsed.rec_headers.get_header
        metadata = {"url": headers("WARC-Target-URI"), "date": headers("WARC-Date")}
        facts = {name: value for name, value in metadata.items() if value}
        url = facts.get("url", "")
        if len(data) > self.max_bytes:
            return self.skipped(place, f"longer than {self.max_bytes} bytes", where, url)
        if parsed.rec_type == "conversion":
            text = data.decode("utf-8", "replace")
            return self.document(place, text, record.where, where, metadata=facts)
        http = parsed.http_headers
        if http is None:
            return self.skipped(place, "no HTTP response", where, url)
        if http.get_statuscode() != OK:
            return self.skipped(place, f"HTTP status {http.get_statuscode()[:3]}", where, url)
        content = http.get_header("Content-Type") or ""
        mime = content.partition(";")[0].strip().lower()
        charset = CHARSET.search(content)
        said = charset[1] if charset else None
        if mime in HTML:
            return self.page(place, data, said, record.where, where, **facts)
        if mime == "text/plain":
            text = decode_page(data, said)
            return self.document(place, text, record.where, where, metadata=facts)
        return self.skipped(place, "neither HTML nor plain text", where, f"{mime} {url}")


def _warcio() -> Any:
    try:
        from warcio.archiveiterator import ArchiveIterator
    except ImportError:
        raise UserError("reading web archives needs warcio: pip install 'qwen2[corpus]'") from None
    return ArchiveIterator
