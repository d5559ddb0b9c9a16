import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from qwen2.common.errors import UserError
from qwen2.corpus import Document
from qwen2.tokens import (
    Encoded,
    Origin,
    PackedLoader,
    ShardIndex,
    Shards,
    index_shards,
    tokenize_documents,
    write_shard,
    write_shards,
)
from qwen2.tokens import tokenize as module
from qwen2.tokens.shard_file import GROUP, ShardNotes, read_notes

END = 3
PAIRS = [("code", [1, 2, 4]), ("prose", []), ("code", [5] * 9), ("chat", [6, 7])]


def write(folder: Path, pairs: list[tuple[str, list[int]]], **options: int) -> ShardIndex:
    values = {"vocab_size": 10, "end_of_text": END, "shard_tokens": 8, **options}
    return write_shards(folder, iter(pairs), tokenizer="abc", **values)


@settings(max_examples=25)
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
    data[-3] ^= 1  # of the last token; its kind follows
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
    assert encoded == [
        ("k", list(f"n{number:03}".encode()), Origin(str(number), "s")) for number in range(11)
    ]
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


@settings(max_examples=10)
@given(
    st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), st.lists(st.integers(0, 9), max_size=9))),
        min_size=1,
        max_size=4,
    ).filter(any),
    st.randoms(use_true_random=False),
)
def test_shards_written_in_any_order_are_the_same_folder(
    tmp_path_factory: pytest.TempPathFactory,
    parts: list[list[tuple[str, list[int]]]],
    random: Random,
) -> None:
    place = tmp_path_factory.mktemp("parts")
    names = [f"shard-00000-{number:05d}.safetensors" for number in range(len(parts))]
    folders = []
    for turn in range(2):
        folder = place / str(turn)
        work = list(zip(names, parts, strict=True))
        random.shuffle(work)
        for name, documents in work:
            write_part(folder / name, documents)
        index_shards(folder, names)
        folders.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert folders[0] == folders[1]
    shards = Shards(folder)
    shards.verify()
    every = [document for documents in parts for document in documents]
    assert len(shards) == len(every)
    for number, (kind, ids) in enumerate(every):
        assert (shards.kind(number), shards.document(number).tolist()) == (kind, [*ids, END])
    assert sum(shards.index.documents_by_kind.values()) == len(every)
    assert sum(shards.index.tokens_by_kind.values()) == shards.tokens


def write_part(path: Path, documents: list[tuple[str, list[int]]], **changes: Any) -> ShardNotes:
    values = {"kinds": ["a", "b", "c"], "vocab_size": 10, "end_of_text": END, "tokenizer": "abc"}
    origins = (
        Encoded(kind, ids, Origin(f"{path.stem}/{row}", "where", "de", path.stem, row))
        for row, (kind, ids) in enumerate(documents)
    )
    return write_shard(path, origins, **{**values, **changes})


def test_every_document_knows_where_it_comes_from(tmp_path: Path) -> None:
    names = ["shard-00000-00000.safetensors", "shard-00000-00001.safetensors"]
    many = [("a", [1])] * (GROUP + 3)
    write_part(tmp_path / names[0], many)
    write_part(tmp_path / names[1], [("b", [2]), ("c", [3])])
    index_shards(tmp_path, names)
    shards = Shards(tmp_path)
    for number, (stem, row) in {
        0: ("shard-00000-00000", 0),
        GROUP - 1: ("shard-00000-00000", GROUP - 1),
        GROUP + 2: ("shard-00000-00000", GROUP + 2),
        GROUP + 4: ("shard-00000-00001", 1),
    }.items():
        assert shards.provenance(number) == (f"{stem}/{row}", "where", "de", stem, row)
        assert shards.find(f"{stem}/{row}") == number
    with pytest.raises(UserError, match="no document with id 'x'"):
        shards.find("x")


def test_a_document_need_not_say_where_it_comes_from(tmp_path: Path) -> None:
    write(tmp_path / "x", PAIRS)
    assert Shards(tmp_path / "x").provenance(3) is None


def test_origins_of_another_shard_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "x", PAIRS)
    write(tmp_path / "y", [(kind, [9 - i for i in ids]) for kind, ids in PAIRS])
    file = "shard-00000.documents.parquet"
    shutil.copy(tmp_path / "y" / file, tmp_path / "x" / file)
    with pytest.raises(UserError, match=r"documents\.parquet: of another shard"):
        Shards(tmp_path / "x").provenance(0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer": "other"}, "made with tokenizer other, others with abc"),
        ({"vocab_size": 11}, "made with vocab_size 11, others with 10"),
        ({"kinds": ["b", "a"]}, "made with kinds"),
    ],
)
def test_shards_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    names = ["shard-00000.safetensors", "shard-00001.safetensors"]
    write_part(tmp_path / names[0], [("a", [1])])
    with pytest.raises(UserError, match=r"shard-00001\.documents.*missing"):
        index_shards(tmp_path, names)
    write_part(tmp_path / names[1], [("a", [1])], **changes)
    with pytest.raises(UserError, match=f"shard-00001.*{message}"):
        index_shards(tmp_path, names)


def test_a_half_written_shard_is_written_again_and_a_whole_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "shard-00000.safetensors"
    path.write_bytes(b"half")  # without its Parquet file, it is what a killed process left
    notes = write_part(path, [("a", [1])])
    assert notes == read_notes(path)
    with pytest.raises(UserError, match="exists already"):
        write_part(path, [("a", [1])])
    path.write_bytes(b"cut")
    with pytest.raises(UserError, match="missing or cut short"):
        index_shards(tmp_path, [path.name])


def test_a_kind_that_is_not_listed_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="kind 'd' is not one of a, b, c"):
        write_part(tmp_path / "shard-00000.safetensors", [("d", [1])])


def test_no_more_shards_are_mapped_than_the_system_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen2.tokens.shards.MAPPED", 2)
    write(tmp_path / "x", [("k", [n]) for n in range(9)], shard_tokens=2)
    shards = Shards(tmp_path / "x")
    assert len(shards.index.shards) == 9
    for number in [*range(9), *range(8, -1, -1)]:
        assert shards.document(number).tolist() == [number, END]
    assert shards._mapped.cache_info().currsize == 2
