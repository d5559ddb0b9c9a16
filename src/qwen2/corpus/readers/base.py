"""What all readers share: their settings, how files become splits, and what makes a document.

Whatever a reader meets it yields in a fixed order, as a `Document` or as `Skipped`, so that a task
that was stopped goes on by leaving out the first n things. Files are ordered by name, never by what
the file system says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from qwen2.common.config import Config
from qwen2.corpus.documents import Document
from qwen2.corpus.files import Found, Skipped, sample_order
from qwen2.corpus.readers.places import Place, file_system, find_places
from qwen2.corpus.readers.streams import FileError, excerpt, failure, unpacked_name

SPLIT_BYTES = 64 << 20  # of files as they are stored
SPLITS = 32  # of a source that is small: enough for many workers to be done at the same time
LEAST_SPLIT = 4 << 20
MAX_BYTES = 8 << 20


class Limit(Config):
    """A sample of a source: its first documents, in the order of the hashes of the files' names.

    Read as one split, so that it is exact: the document that would pass the limit ends the source.
    """

    documents: PositiveInt | None = None
    megabytes: PositiveFloat | None = None
    """10^6 bytes of UTF-8 of the texts."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.documents is None and self.megabytes is None:
            raise ValueError("give documents or megabytes")
        return self

    def within(self, found: Iterable[Found]) -> Iterator[Found]:
        """`found` up to the limit."""
        documents, size = 0, 0
        for thing in found:
            if isinstance(thing, Document):
                documents += 1
                size += len(thing.text.encode("utf-8", "surrogatepass"))
                if self.megabytes is not None and size > self.megabytes * 1e6:
                    return
            yield thing
            if documents == self.documents:
                return


class Range(Config):
    """A piece of a file: row groups of Parquet, bytes of JSON Lines."""

    first: int
    last: int
    """The one behind the last."""
    records: int = 0
    """Lines or rows of the file before it."""


class Split(Config):
    """What one task reads: files, or a range of one."""

    source: str
    number: int
    files: tuple[Place, ...]
    range: Range | None = None


class Reader(Config):
    """A source of documents."""

    name: str = Field(pattern=r"^[^/#\s]+$")
    """Ids of its documents begin with it."""
    kind: str
    """Domain: `code`, `prose`, `web` ..."""
    language: str | None = None
    """The source's own label; a path's or a record's goes before."""
    licence: str | None = None
    filters: str = "none"
    """Name of a filter set of the recipe."""
    max_bytes: PositiveInt = MAX_BYTES
    """Of one record as it is stored (file, line, page; unpacked) and of its text."""
    limit: Limit | None = None

    def splits(self) -> list[Split]:
        """The splits, in an order that depends on names and sizes only.

        Raises:
            UserError: a path does not exist or is out of reach.
        """
        raise NotImplementedError

    def read(self, split: Split) -> Iterator[Found]:
        """Stream the documents of a split, and what was skipped and why; each time the same.

        Texts and metadata can hold no NUL. A text can hold lone surrogates (a record's JSON may
        spell them), which `filters.repair` mends.

        Raises:
            UserError: a remote store is out of reach, or an optional package is not installed.
        """
        found = self._found(split)
        return self.limit.within(found) if self.limit else found

    def _found(self, split: Split) -> Iterator[Found]:
        raise NotImplementedError

    def document(
        self,
        place: Place,
        text: str,
        record: str = "",
        where: str = "",
        *,
        language: str | None = None,
        licence: str | None = None,
        group: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Found:
        """The document, or why its text is none.

        Args:
            record: which of the file's records it is; empty when the file is one document.
            where: the place in the file, for a person.
        """
        reason = None
        if not text or text.isspace():
            reason = "empty text"
        elif "\0" in text:
            reason = "text holds NUL"
        elif _is_longer(text, self.max_bytes):
            reason = f"longer than {self.max_bytes} bytes"
        if reason:
            return self.skipped(place, reason, where, text)
        name = place.name.replace("%", "%25").replace("#", "%23")
        return Document(
            text,
            f"{self.name}/{name}#{record}" if record else f"{self.name}/{name}",
            place.url,
            self.kind,
            licence or self.licence,
            language or place.language or self.language,
            group or place.group,
            metadata or {},
        )

    def skipped(
        self, place: Place, reason: str, where: str = "", data: bytes | str = "", at: int = 0
    ) -> Skipped:
        return Skipped(self.kind, reason, place.url + where, excerpt(data, at))


class FileReader(Reader):
    """A source of files."""

    paths: tuple[str, ...] = Field(min_length=1)
    """Files, folders, patterns or URLs; see `places`."""

    SUFFIXES: ClassVar[tuple[str, ...]] = ()
    LEFT_OUT: ClassVar[frozenset[str]] = frozenset()
    """Names of folders that are not entered."""

    def splits(self) -> list[Split]:
        return self._splits_of(find_places(self.paths, self._wants, self.LEFT_OUT))

    def _splits_of(self, places: list[Place]) -> list[Split]:
        """Files together up to 64 MB a split; all of them in one when there is a limit.

        A source of less than 2 GB is cut finer, into about 32 splits of at least 4 MB. A file of
        more than that is a split of its own, or some where its format can be cut.
        """
        groups: list[tuple[list[Place], Range | None]] = [([], None)]
        size = 0
        if self.limit:
            by_name = {place.name: place for place in places}
            groups = [([by_name[name] for name in sample_order(by_name)], None)]
        else:
            share = sum(place.size for place in places) // SPLITS
            most = min(SPLIT_BYTES, max(LEAST_SPLIT, share))
            for place in places:
                if place.size > most:
                    ranges: Sequence[Range | None] = self._cut(place, most) or [None]
                    groups += [([place], part) for part in ranges]
                    size = place.size
                    continue
                if groups[-1][0] and size + place.size > most:
                    groups.append(([], None))
                    size = 0
                groups[-1][0].append(place)
                size += place.size
        return [
            Split(source=self.name, number=number, files=tuple(files), range=part)
            for number, (files, part) in enumerate(of for of in groups if of[0] or len(groups) == 1)
        ]

    def _cut(self, place: Place, most: int) -> list[Range]:
        """Ranges of about `most` bytes that are the whole file; none when it cannot be cut."""
        return []

    def _wants(self, name: str) -> bool:
        """Whether a file below a folder is taken."""
        return unpacked_name(name).lower().endswith(self._suffixes)

    @property
    def _suffixes(self) -> tuple[str, ...]:
        return self.SUFFIXES

    def _found(self, split: Split) -> Iterator[Found]:
        for place in split.files:
            try:
                yield from self._file(place, split)
            except Exception as error:
                damage = failure(file_system(place.url)[0], place.url, error)
                if not isinstance(damage, FileError):
                    raise damage from None
                yield self.skipped(place, damage.reason, damage.where)

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        """The documents of one file.

        Raises:
            FileError: the file, or the rest of it, cannot be read.
        """
        raise NotImplementedError


def _is_longer(text: str, limit: int) -> bool:
    """Whether `text` has more than `limit` bytes of UTF-8."""
    return 4 * len(text) > limit and len(text.encode("utf-8", "surrogatepass")) > limit
