import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qwen2.common.errors import UserError
from qwen2.corpus import Document
from qwen2.tokens import PackedLoader, ShardIndex, Shards, tokenize_documents, write_shards
from qwen2.tokens import shards as module

END = 3
PAIRS = [("code", [1, 2, 4]), ("prose", []), ("code", [5] * 9), ("chat", [6, 7])]


def write(folder: Path, pairs: list[tuple[str, list[int]]], **options: int) -> ShardIndex:
    values = {"vocab_size": 10, "end_of_text": END, "shard_tokens": 8, **options}
    return write_shards(folder, iter(pairs), tokenizer="abc", **values)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.sampled_from(["code", "prose"]), st.lists(st.integers(0, 9), max_size=12)),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 20),
    st.sampled_from([10, 1 << 16, (1 << 16) + 1]),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    pairs: list[tuple[str, list[int]]],
    shard_tokens: int,
    vocab_size: int,
) -> None:
    folder = tmp_path_factory.mktemp("shards") / "x"
    index = write(folder, pairs, shard_tokens=shard_tokens, vocab_size=vocab_size)
    shards = Shards(folder)
    shards.verify()
    assert len(shards) == len(pairs)
    for number, (kind, ids) in enumerate(pairs):
        assert shards.document(number).tolist() == [*ids, END]
        assert shards.kind(number) == kind
    assert shards.lengths.tolist() == [len(ids) + 1 for _, ids in pairs]
    assert shards.tokens == shards.lengths.sum() == sum(index.tokens_by_kind.values())
    assert sum(index.documents_by_kind.values()) == len(pairs)
    assert shards.index == index
    for entry in index.shards:
        assert entry.tokens <= shard_tokens or entry.documents == 1
    wide = np.uint16 if vocab_size <= 1 << 16 else np.uint32
    assert shards.document(0).dtype == wide


def test_shards_are_safetensors_that_say_what_they_are(tmp_path: Path) -> None:
    index = write(tmp_path / "x", PAIRS)
    assert [(e.documents, e.tokens) for e in index.shards] == [(2, 5), (1, 10), (1, 3)]
    with safe_open(tmp_path / "x" / index.shards[-1].name, framework="np") as file:
        assert file.metadata() == {
            "format": "qwen2-shard",
            "vocab_size": "10",
            "end_of_text": "3",
            "tokenizer": "abc",
            "kinds": '["code", "prose", "chat"]',
        }
        assert file.get_tensor("offsets").tolist() == [0, 3]


def test_ids_of_the_highest_vocabulary_survive(tmp_path: Path) -> None:
    for vocab_size in (1 << 16, 151_936):
        folder = tmp_path / str(vocab_size)
        write(folder, [("k", [vocab_size - 1, 0])], vocab_size=vocab_size)
        assert Shards(folder).document(0).tolist() == [vocab_size - 1, 0, END]


def test_documents_are_read_only_views_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "x", PAIRS)
    document = Shards(tmp_path / "x").document(2)
    assert document.base is not None
    with pytest.raises(ValueError, match="read-only"):
        document[0] = 1
    with pytest.raises(IndexError):
        Shards(tmp_path / "x").document(4)


@pytest.mark.parametrize("ids", [[10], [-1]])
def test_ids_outside_the_vocabulary_leave_nothing(tmp_path: Path, ids: list[int]) -> None:
    with pytest.raises(UserError, match=f"token id {ids[0]} is outside the vocabulary of 10"):
        write(tmp_path / "x", [*PAIRS, ("k", ids)])
    with pytest.raises(UserError, match="no documents"):
        write(tmp_path / "x", [])
    assert list(tmp_path.iterdir()) == []


def _truncate(folder: Path) -> None:
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def _swap(folder: Path) -> None:
    shutil.copy(folder / "shard-00001.safetensors", folder / "shard-00000.safetensors")


def _set(key: str, value: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        index = json.loads((folder / "shards.json").read_text())
        (folder / "shards.json").write_text(json.dumps({**index, key: value}))

    return change


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: (f / "shards.json").unlink(), r"x: no shards\.json; not a folder of shards"),
        (lambda f: (f / "shards.json").write_text("{"), r"shards\.json: not readable"),
        (lambda f: (f / "manifest.json").unlink(), r"x: no manifest\.json"),
        (lambda f: (f / "shard-00001.safetensors").unlink(), "shard-00001.*: missing"),
        (lambda f: (f / "shard-00001.safetensors").write_bytes(b""), "shard-00001.*: damaged"),
        (_truncate, "shard-00001.*: damaged"),
        (_swap, "shard-00000.*: its documents are not as"),
        (_set("tokenizer", "other"), "shard-00000.*: made with another tokenizer"),
        (_set("vocab_size", 11), "shard-00000.*: made for another vocabulary"),
        (_set("kinds", []), "shard-00000.*: its documents are not as"),
        (_set("kind", []), "unknown key 'kind'; did you mean 'kinds'"),
        (
            _set("shards", [{"name": "../x.safetensors", "documents": 1, "tokens": 1}]),
            r"shards\.0\.name",
        ),
    ],
)
def test_damage_is_named_when_opened(
    tmp_path: Path, harm: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "x"
    write(folder, PAIRS)
    harm(folder)
    with pytest.raises(UserError, match=message) as error:
        Shards(folder)
    assert "\n" not in str(error.value)


def test_a_flipped_bit_is_named_by_verify(tmp_path: Path) -> None:
    folder = tmp_path / "x"
    write(folder, PAIRS)
    path = folder / "shard-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00002.*sha256"):
        Shards(folder).verify()


def test_tokenizes_in_batches_and_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH_BYTES", 10)
    sizes: list[int] = []

    def encode(texts: list[str]) -> list[list[int]]:
        sizes.append(len(texts))
        return [list(text.encode()) for text in texts]

    def documents() -> Iterator[Document]:
        for number in range(11):
            yield Document(f"n{number:03}", str(number), "s", "k")

    encoded = list(tokenize_documents(documents(), encode))
    assert encoded == [("k", list(f"n{number:03}".encode())) for number in range(11)]
    assert sizes == [3, 3, 3, 2]


def test_loader_over_shards(tmp_path: Path) -> None:
    write(tmp_path / "x", PAIRS)
    write(tmp_path / "y", PAIRS[::-1])
    shards, other = Shards(tmp_path / "x"), Shards(tmp_path / "y")
    loader = PackedLoader(shards, context=5, rows=1)
    every = [token for _, ids in PAIRS for token in [*ids, END]]
    rows = -(-len(every) // 5)
    stream = [token for _ in range(rows) for token in next(loader).targets.tolist()]
    assert Counter(every) <= Counter(stream)
    with pytest.raises(UserError, match="the saved state has shards"):
        PackedLoader(other, context=5, rows=1).load_state_dict(loader.state_dict())
