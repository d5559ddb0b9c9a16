import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from reading import SOURCE, read

from qwen2.common.errors import UserError
from qwen2.corpus.readers import HubSource


class FakeHub(MemoryFileSystem):
    """The hub's file system, in memory."""

    protocol = "hf"
    store: dict[str, object] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("hf://").strip("/")


def hub(**settings: object) -> HubSource:
    values = {"name": "s", "kind": "web", "format": "hub", "dataset": "who/what", **settings}
    source: HubSource = SOURCE.validate_python(values)
    return source


@pytest.fixture
def _hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_registry, "hf", FakeHub)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info",
        lambda self, name, revision: SimpleNamespace(sha=f"c0ffee-{revision}"),
    )  # fmt: skip
    fs = FakeHub()
    root = "/datasets/who/what@c0ffee-main"
    pq.write_table(pa.table({"text": ["a", "b"], "url": ["u", "v"]}), tmp_path / "p")
    fs.pipe(f"{root}/data/train-0.parquet", (tmp_path / "p").read_bytes())
    fs.pipe(f"{root}/more/x.jsonl", json.dumps({"text": "c"}).encode() + b"\nbroken")
    fs.pipe(f"{root}/README.md", b"no data")


@pytest.mark.usefixtures("_hub")
def test_files_of_a_data_set() -> None:
    documents, skipped = read(hub())
    assert [(d.id, d.text) for d in documents] == [
        ("s/data/train-0.parquet#0", "a"), ("s/data/train-0.parquet#1", "b"),
        ("s/more/x.jsonl#1", "c"),
    ]  # fmt: skip
    assert documents[0].metadata == {"url": "u"}
    assert "@c0ffee-main/data" in documents[0].source
    assert [s.reason for s in skipped] == ["not JSON"]
    documents, _ = read(hub(paths=["data/*.parquet"], limit={"documents": 1}))
    assert [d.text for d in documents] == ["a"]


def test_no_network_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: object, name: str, revision: str) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(UserError, match=r"data set who/what: .*no route to host.*download it"):
        hub().splits()
