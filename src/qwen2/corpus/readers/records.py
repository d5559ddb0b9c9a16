"""Records with named fields (a line of JSONL, a row of Parquet) as documents."""

from __future__ import annotations

import datetime
import functools
import hashlib
from collections.abc import Collection, Mapping
from typing import Any

from qwen2.common.config import Config
from qwen2.corpus.files import Found
from qwen2.corpus.readers.base import FileReader
from qwen2.corpus.readers.places import Place

LISTED = 10  # fields that an excerpt names when the text is missing


class Fields(Config):
    """Which field of a record is what; None: the records have none."""

    text: str = "text"
    id: str | None = None
    """Takes the place of the record's number in the document's id; a second record of a file with
    the same one is skipped."""
    language: str | None = None
    licence: str | None = None
    group: str | None = None

    @functools.cached_property
    def labels(self) -> dict[str, str]:
        """Attribute of a document -> field."""
        return self.model_dump(exclude={"text", "id"}, exclude_none=True)

    @property
    def all(self) -> set[str]:
        return set(self.model_dump(exclude_none=True).values())


class RecordReader(FileReader):
    """A source of files of records."""

    fields: Fields = Fields()
    metadata: tuple[str, ...] | None = None
    """Fields that a document keeps beside its text; None: all others."""

    def record(
        self, place: Place, record: Mapping[str, Any], number: int, where: str, seen: set[bytes]
    ) -> Found:
        """The document of a record.

        Args:
            number: of the record in its file.
            seen: digests of the ids of the file so far.
        """
        fields = self.fields
        if fields.text not in record:
            known = ", ".join(list(record)[:LISTED])
            return self.skipped(place, f"no field {fields.text!r}", where, known)
        text = record[fields.text]
        if not isinstance(text, str):
            return self.skipped(place, "text is no string", where, repr(text)[:1000])
        identity = str(number)
        if fields.id is not None:
            value = record.get(fields.id)
            if not isinstance(value, str | int) or value == "":
                return self.skipped(place, f"no id in field {fields.id!r}", where, text)
            identity = encodable(str(value))
            digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
            if digest in seen:
                return self.skipped(place, "id came before in this file", where, identity)
            seen.add(digest)
        labels = {
            name: encodable(value)
            for name, field in fields.labels.items()
            if isinstance(value := record.get(field), str) and value
        }
        if self.metadata is None:
            taken = {fields.text, fields.id, *(fields.labels[name] for name in labels)}
            metadata = {name: value for name, value in record.items() if name not in taken}
        else:
            metadata = {name: record[name] for name in self.metadata if name in record}
        return self.document(place, text, identity, where, metadata=metadata, **labels)


def encodable(text: str) -> str:
    """`text` with \\ud800 and the like for lone surrogates and without NUL."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "")


def plain(value: Any) -> Any:
    """`value` as JSON can hold it and UTF-8 encode it: dates in ISO 8601, bytes left out."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return encodable(value)
    if isinstance(value, Mapping):
        return {encodable(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        return None
    return [plain(v) for v in value] if isinstance(value, Collection) else str(value)
