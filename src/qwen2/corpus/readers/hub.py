"""Data sets of the Hugging Face hub: their Parquet and JSONL files, read where they are.

The files are streamed over the network, not copied. The revision is looked up once, when splits are
made; the splits name its commit, so that a run that goes on later reads the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from qwen2.common.config import one_line
from qwen2.common.errors import UserError
from qwen2.corpus.files import Found
from qwen2.corpus.readers.base import Range, Split
from qwen2.corpus.readers.jsonl import JsonlSource, line_ranges, read_jsonl
from qwen2.corpus.readers.parquet import ParquetSource, read_parquet, row_groups
from qwen2.corpus.readers.places import Place, find_places
from qwen2.corpus.readers.records import RecordReader
from qwen2.corpus.readers.streams import unpacked_name


class HubSource(RecordReader):
    """A data set of the hub."""

    format: Literal["hub"]
    dataset: str = Field(pattern=r"^[\w.-]+/[\w.-]+$")
    """`owner/name`."""
    revision: str = "main"
    """Branch, tag or commit."""
    paths: tuple[str, ...] = ("",)
    """Files, folders or patterns in the repository; default: all."""

    SUFFIXES: ClassVar[tuple[str, ...]] = (*ParquetSource.SUFFIXES, *JsonlSource.SUFFIXES)

    def splits(self) -> list[Split]:
        root = f"hf://datasets/{self.dataset}@{self._commit()}"
        paths = [f"{root}/{path}".rstrip("/") for path in self.paths]
        return self._splits_of(find_places(paths, self._wants))

    def _cut(self, place: Place, most: int) -> list[Range]:
        return row_groups(place, most) if _is_parquet(place) else line_ranges(place, most)

    def _commit(self) -> str:
        from huggingface_hub import HfApi

        try:
            return str(HfApi().dataset_info(self.dataset, revision=self.revision).sha)
        except Exception as error:  # of its HTTP library, of the hub, of the system
            raise UserError(
                f"data set {self.dataset}: the hub is out of reach or has no such data set or "
                f"revision ({type(error).__name__}: {one_line(error)[:200]}); check its name and "
                "the network, or download it and use format: parquet or jsonl"
            ) from None

    def _file(self, place: Place, split: Split) -> Iterator[Found]:
        read = read_parquet if _is_parquet(place) else read_jsonl
        return read(self, place, split)


def _is_parquet(place: Place) -> bool:
    return unpacked_name(place.name).lower().endswith(ParquetSource.SUFFIXES)
