from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.corpus import Document, read_documents, write_documents
from qwen2.corpus import documents as module

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
VALUE = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | TEXT | st.lists(TEXT)
METADATA = st.dictionaries(TEXT, VALUE, max_size=3)
LABEL = st.none() | TEXT
DOCUMENT = st.builds(Document, TEXT, TEXT, TEXT, TEXT, LABEL, LABEL, LABEL, METADATA)


@settings(max_examples=40)
@given(st.lists(DOCUMENT, max_size=9))
def test_parquet_gives_back_any_documents(
    tmp_path_factory: pytest.TempPathFactory, written: list[Document]
) -> None:
    path = tmp_path_factory.mktemp("documents") / "x.parquet"
    assert write_documents(path, iter(written)) == len(written)
    assert list(read_documents(path, batch=2)) == written


def test_writer_cuts_row_groups_so_that_memory_stays_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ROW_GROUP_BYTES", 100)
    write_documents(tmp_path / "x", (Document("a" * 50, str(i), "s", "k") for i in range(10)))
    assert pq.ParquetFile(tmp_path / "x").num_row_groups == 5


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.parquet: no such file"):
        list(read_documents(tmp_path / "gone.parquet"))

    broken = tmp_path / "broken.parquet"
    write_documents(broken, [Document("text", "id", "source", "kind")])
    broken.write_bytes(broken.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"broken\.parquet: not a readable Parquet"):
        list(read_documents(broken))

    foreign = tmp_path / "foreign.parquet"
    pq.write_table(pa.table({"text": ["a"], "url": ["b"]}), foreign)
    with pytest.raises(UserError, match="no column group, id"):
        list(read_documents(foreign))
