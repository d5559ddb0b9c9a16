"""From files to documents: a source of a recipe by its `format`."""

from typing import Annotated

from pydantic import Field

from qwen2.corpus.readers.base import FileReader, Limit, Reader, Split
from qwen2.corpus.readers.code import CodeSource
from qwen2.corpus.readers.html import HtmlSource
from qwen2.corpus.readers.hub import HubSource
from qwen2.corpus.readers.jsonl import JsonlSource
from qwen2.corpus.readers.machine import MachineSource
from qwen2.corpus.readers.man_source import ManSource
from qwen2.corpus.readers.parquet import ParquetSource
from qwen2.corpus.readers.places import Place
from qwen2.corpus.readers.records import Fields, RecordReader
from qwen2.corpus.readers.text import TextSource
from qwen2.corpus.readers.warc import WarcSource
from qwen2.corpus.readers.xml import XmlSource

Source = Annotated[
    JsonlSource
    | ParquetSource
    | TextSource
    | HtmlSource
    | XmlSource
    | ManSource
    | WarcSource
    | CodeSource
    | HubSource
    | MachineSource,
    Field(discriminator="format"),
]
"""What a recipe says of one source."""

__all__ = [
    "CodeSource",
    "Fields",
    "FileReader",
    "HtmlSource",
    "HubSource",
    "JsonlSource",
    "Limit",
    "MachineSource",
    "ManSource",
    "ParquetSource",
    "Place",
    "Reader",
    "RecordReader",
    "Source",
    "Split",
    "TextSource",
    "WarcSource",
    "XmlSource",
]
