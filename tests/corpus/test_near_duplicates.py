"""Duplicates over files of sketches, against a plain reference that compares all pairs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.common.files import verify_folder
from qwen2.corpus import Document, join, near_duplicates, text_digest
from qwen2.corpus.join import Components, Partitions
from qwen2.corpus.minhash import MinHash, has_words, similarity
from qwen2.corpus.near_duplicates import CLUSTERS, dropped_rows, find_duplicates, without
from qwen2.corpus.rows import Rows
from qwen2.corpus.sketches import sketch_schema, write_sketches

FAMILY = MinHash()


def corpus(number: int = 60, seed: int = 0) -> list[Document]:
    """Documents of 60 to 80 words; half of them are others with 0 to 4 words changed."""
    r = random.Random(seed)
    texts: list[list[str]] = []
    for _ in range(number):
        if texts and r.random() < 0.5:
            words = list(r.choice(texts))
            for _ in range(r.randrange(5)):
                words[r.randrange(len(words))] = f"new{r.random()}"
        else:
            words = [f"w{r.randrange(5000)}" for _ in range(r.randrange(60, 80))]
        texts.append(words)
    return [
        Document(" ".join(words), f"{'ab'[i % 2]}{i:03d}", "s", "prose")
        for i, words in enumerate(texts)
    ]


def priority(document: Document) -> int:
    return int(document.id[0] == "b")


def write(folder: Path, name: str, documents: Sequence[Document], parts: int) -> list[Path]:
    paths = []
    for i in range(parts):
        paths.append(folder / f"{name}{i}.sketches")
        low, high = (len(documents) * j // parts for j in (i, i + 1))
        write_sketches(paths[-1], documents[low:high], FAMILY, priority)
    return paths


def run(
    folder: Path, documents: Sequence[Document], parts: int, older: Sequence[Document] = ()
) -> tuple[set[str], list[dict[str, Any]]]:
    """Ids that stay, and the table of clusters."""
    folder.mkdir()
    files = write(folder, "new", documents, parts)
    find_duplicates(folder / "out", files, FAMILY, write(folder, "old", older, 2) if older else ())
    assert verify_folder(folder / "out") is None
    kept: set[str] = set()
    for i in range(parts):
        low, high = (len(documents) * j // parts for j in (i, i + 1))
        gone = dropped_rows(folder / "out", i)
        kept |= {d.id for d in without(documents[low:high], gone)}
    return kept, pq.read_table(folder / "out" / CLUSTERS).to_pylist()


def reference(
    documents: Sequence[Document], older: frozenset[str] = frozenset()
) -> tuple[set[str], dict[str, str]]:
    """By all pairs: ids that stay, and for each document of a cluster the one that stays."""
    signatures = FAMILY.signatures([d.text for d in documents])
    keys, words = FAMILY.band_keys(signatures), has_words(signatures)
    cluster = list(range(len(documents)))
    for i in range(len(documents)):
        for j in range(i):
            alike = words[i] and words[j] and (keys[i] == keys[j]).any()
            if alike or text_digest(documents[i].text) == text_digest(documents[j].text):
                old, new = cluster[i], cluster[j]
                cluster = [new if c == old else c for c in cluster]
    best: dict[int, Document] = {}
    rank = sorted(documents, key=lambda d: (d.id not in older, -priority(d), -d.size, d.id))
    of = {d.id: c for d, c in zip(documents, cluster, strict=True)}
    for document in rank:
        best.setdefault(of[document.id], document)
    sizes = {c: cluster.count(c) for c in cluster}
    stays = {i: best[c].id for i, c in of.items() if sizes[c] > 1}
    return {d.id for d in best.values()}, stays


def test_equals_the_comparison_of_all_pairs_in_any_order_and_any_files(tmp_path: Path) -> None:
    documents = corpus()
    expected, stays = reference(documents)
    assert 20 < len(expected) < 45
    shuffled = random.Random(1).sample(documents, len(documents))
    for i, (given_, parts) in enumerate([(documents, 1), (documents, 4), (shuffled, 3)]):
        kept, table = run(tmp_path / str(i), given_, parts)
        assert kept == expected
        assert {row["id"]: row["cluster"] for row in table} == stays
        assert all(row["kept"] == (row["id"] == row["cluster"]) for row in table)


def test_the_table_says_how_similar_and_where(tmp_path: Path) -> None:
    documents = corpus()
    by_id = {d.id: d for d in documents}
    _, table = run(tmp_path / "a", documents, 2)
    places = [row["file"] for row in table]
    assert places == [f"new{int(row['id'][1:]) // 30}.sketches" for row in table]
    for row in table:
        pair = FAMILY.signatures([by_id[row[x]].text for x in ("id", "cluster")])
        assert row["similarity"] == similarity(pair[:1], pair[1:])[0]
    assert any(row["similarity"] < 1 for row in table)
    first_of_cluster = {row["cluster"]: row["id"] for row in reversed(table)}
    assert all(cluster == first for cluster, first in first_of_cluster.items())


@pytest.mark.parametrize("cut", [10, 30, 50])
def test_a_new_source_against_an_older_set(tmp_path: Path, cut: int) -> None:
    """As if all had been compared together with the older ones first, though their texts are gone
    and all sketches of the older set stay, whether kept or not."""
    documents = corpus()
    older, new = documents[:cut], documents[cut:]

    kept, table = run(tmp_path / "a", new, 3, older)

    first = frozenset(d.id for d in older)
    expected, _ = reference(documents, first)
    assert kept == expected - first
    assert {row["id"] for row in table if row["kept"]} <= first | kept
    assert all(row["older"] == (row["id"] in first) for row in table)
    assert {row["id"] for row in table if not row["kept"]} == {d.id for d in new} - kept


def test_survivor_by_priority_then_length_then_id(tmp_path: Path) -> None:
    same = "one two three four five six seven eight"
    for name, documents, expected in [
        ("priority", [("a1", same + " "), ("b2", same)], "b2"),
        ("length", [("a1", same), ("a2", same + "  ")], "a2"),
        ("id", [("a2", same), ("a1", same)], "a1"),
    ]:
        kept, _ = run(tmp_path / name, [Document(t, i, "s", "k") for i, t in documents], 1)
        assert kept == {expected}, name


def test_texts_without_words_are_duplicates_only_when_equal(tmp_path: Path) -> None:
    documents = [Document(t, i, "s", "k") for i, t in [("a1", "!"), ("a2", "?"), ("a3", "! ")]]
    kept, table = run(tmp_path / "a", documents, 1)
    assert kept == {"a2", "a3"}
    assert [row["similarity"] for row in table] == [1.0, 1.0]


def test_nothing_to_compare(tmp_path: Path) -> None:
    assert run(tmp_path / "a", [], 1) == (set(), [])
    assert run(tmp_path / "b", corpus(1), 1) == ({"a000"}, [])


def test_small_partitions_and_chunks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = corpus()
    expected = run(tmp_path / "a", documents, 2)
    monkeypatch.setattr(join, "RECORDS", 7)
    monkeypatch.setattr(join, "BUFFERED", 50)
    monkeypatch.setattr(near_duplicates, "CHUNK", 3)
    assert run(tmp_path / "b", documents, 2) == expected
    assert sorted(p.name for p in (tmp_path / "b/out").iterdir()) == [
        "clusters.parquet", "dropped.npy", "manifest.json", "summary.json",
    ]  # fmt: skip


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    for name in "ab":
        run(tmp_path / name, corpus(), 2)
    for file in ("new0.sketches", "out/clusters.parquet", "out/dropped.npy", "out/manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_files_of_another_family_are_refused(tmp_path: Path) -> None:
    write_sketches(tmp_path / "x", corpus(3), MinHash(seed=5))
    with pytest.raises(UserError, match="x: made by other settings"):
        find_duplicates(tmp_path / "out", [tmp_path / "x"], FAMILY)
    with pytest.raises(UserError, match="no such file"):
        find_duplicates(tmp_path / "out", [tmp_path / "y"], FAMILY)
    (tmp_path / "z").write_bytes(b"not arrow")
    with pytest.raises(UserError, match="damaged"):
        find_duplicates(tmp_path / "out", [tmp_path / "z"], FAMILY)
    assert not (tmp_path / "out").exists()


def test_taking_rows_out_of_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen2.corpus.sketches.BATCH_DOCUMENTS", 4)
    documents = corpus(30)
    sketches = Rows.open(write(tmp_path, "x", documents, 3), sketch_schema(FAMILY))
    assert len(sketches) == 30
    rows = np.array([29, 0, 7, 7, 12])
    taken = sketches.take(rows, ["id", "bytes"])
    assert taken["id"].to_pylist() == [documents[i].id for i in rows]
    assert taken["bytes"].to_pylist() == [documents[i].size for i in rows]
    assert sketches.take(rows[:0], ["id"]).num_rows == 0
    assert [first for first, _ in sketches] == [0, 4, 8, 10, 14, 18, 20, 24, 28]


@settings(max_examples=50)
@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 20), st.integers(1, 2))
def test_runs_are_the_equal_keys(
    tmp_path_factory: pytest.TempPathFactory, keys: list[int], records: int, words: int
) -> None:
    spread = np.array(keys, np.uint64) * np.uint64(0x0D79435E50D79436)
    columns = np.column_stack([spread] * words)
    columns[:, -1] //= np.uint64(2)  # so that first words collide where there are two
    if words == 2:
        columns[:, 0] = columns[:, 0] // np.uint64(2**62) * np.uint64(2**62)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(join, "RECORDS", records)
        patch.setattr(join, "BUFFERED", 8)
        partitions = Partitions(tmp_path_factory.mktemp("p"), 1, len(keys), words)
        for low in range(0, len(keys), 5):
            rows = np.arange(low, min(low + 5, len(keys)))
            partitions.add(0, columns[rows], rows)
        found = []
        for rows, numbers in partitions.runs():
            assert (np.diff(numbers) >= 0).all()
            found += [rows[numbers == n].tolist() for n in np.unique(numbers)]
    expected = [[i for i, k in enumerate(keys) if k == key] for key in set(keys)]
    assert sorted(found) == sorted(rows for rows in expected if len(rows) > 1)


@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=40), st.integers(1, 9))
def test_components_are_those_of_a_search(pairs: list[tuple[int, int]], size: int) -> None:
    sets = Components(20)
    for low in range(0, len(pairs), size):
        part = np.array(pairs[low : low + size])
        sets.union(part[:, 0], part[:, 1])
    expected = list(range(20))
    for _ in range(20):
        for a, b in pairs:
            expected[a] = expected[b] = min(expected[a], expected[b])
    assert sets.roots(np.arange(20)).tolist() == expected
