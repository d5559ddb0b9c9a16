"""Where labels come from, and what is held out."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen2.common.errors import UserError
from qwen2.corpus.documents import Document, write_documents
from qwen2.corpus.quality.labels import (
    Example,
    LabelSource,
    TextSource,
    balance,
    hold_out,
    read_examples,
)


def lines(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_sources_of_one_class_and_of_own_labels(tmp_path: Path) -> None:
    good = lines(tmp_path / "good.jsonl", {"text": "a", "language": "en"}, {"text": "b"})
    judged = lines(tmp_path / "judged.jsonl", {"body": "c", "score": 4}, {"body": "d", "score": 0})
    found = read_examples(
        [
            LabelSource(path=good, label=1),
            LabelSource(path=judged, text="body", label_key="score", highest=5),
        ]
    )
    assert {(e.text, e.target, e.language) for e in found} == {
        ("a", 1.0, "en"),
        ("b", 1.0, "unknown"),
        ("c", 0.8, "unknown"),
        ("d", 0.0, "unknown"),
    }


def test_documents_of_some_kinds_from_a_folder(tmp_path: Path) -> None:
    kinds = ("prose", "code", "prose")
    documents = [
        Document(f"text {i}", f"id{i}", "here", kind, language="de", group="g")
        for i, kind in enumerate(kinds)
    ]
    (tmp_path / "deep").mkdir()
    write_documents(tmp_path / "deep/documents.parquet", documents)
    with gzip.open(tmp_path / "more.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "packed", "kind": "prose"}) + "\n\n")
    source = LabelSource(path=tmp_path, kinds=frozenset({"prose"}), label=0)
    found = list(source.examples())
    assert sorted(e.text for e in found) == ["packed", "text 0", "text 2"]
    assert {e.key for e in found if e.text != "packed"} == {"g"}


def test_the_first_source_labels_a_text_and_a_judge_before_it(tmp_path: Path) -> None:
    one = LabelSource(path=lines(tmp_path / "1.jsonl", {"text": "x"}, {"text": "y"}), label=1)
    two = LabelSource(path=lines(tmp_path / "0.jsonl", {"text": "x"}, {"text": "z"}), label=0)
    found = {e.text: e.target for e in read_examples([one, two])}
    assert found == {"x": 1.0, "y": 1.0, "z": 0.0}
    judged = [Example("y", 0.2, "en", "judge", "y")]
    assert {e.text: e.target for e in read_examples([one, two], judged)}["y"] == 0.2


def test_the_most_are_chosen_whatever_their_order(tmp_path: Path) -> None:
    records = [{"text": f"text {i}"} for i in range(50)]
    one = TextSource(path=lines(tmp_path / "1.jsonl", *records), most=7)
    other = TextSource(path=lines(tmp_path / "2.jsonl", *records[::-1]), most=7)
    chosen = [[text for _, text, _ in source.records()] for source in (one, other)]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 7


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"labels\.jsonl:1: not JSON"),
        ("[1]", r"labels\.jsonl:1: not a JSON object"),
        ('{"body": 1}', r"labels\.jsonl:1: no text under 'text'"),
        ('{"text": "a", "label": 7}', r"labels\.jsonl:1: label 7: expected a number from 0 to 5"),
        ('{"text": "a"}', r"label None: expected a number"),
    ],
)
def test_a_bad_record_is_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "labels.jsonl").write_text(line + "\n")
    source = LabelSource(path=tmp_path / "labels.jsonl", label_key="label", highest=5)
    with pytest.raises(UserError, match=message):
        list(source.examples())


def test_bad_places_and_one_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        list(TextSource(path=tmp_path / "none").records())
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="not readable as Parquet"):
        list(TextSource(path=tmp_path / "x.parquet").records())
    (tmp_path / "x.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(UserError, match="not readable"):
        list(TextSource(path=tmp_path / "x.jsonl.gz").records())
    only = LabelSource(path=lines(tmp_path / "1.jsonl", {"text": "x"}), label=1)
    with pytest.raises(UserError, match="1 of 1 texts are good"):
        read_examples([only])
    with pytest.raises(UserError, match="either label"):
        LabelSource.parse({"path": "x"})
    with pytest.raises(UserError, match="either label"):
        LabelSource.parse({"path": "x", "label": 1, "label_key": "label"})


def examples(language: str, good: int, bad: int) -> list[Example]:
    return [
        Example(f"{language} {i}", float(i < good), language, "here", f"{language}{i // 2}")
        for i in range(good + bad)
    ]


def test_groups_stay_together_and_each_class_of_each_language_is_held_out() -> None:
    every = examples("en", 200, 100) + examples("de", 6, 6)
    train, held = hold_out(every, 0.25, 0)
    assert not {e.key for e in train} & {e.key for e in held}
    assert len(train) + len(held) == len(every)
    assert 0.1 < len(held) / len(every) < 0.4
    assert {(e.language, e.target) for e in held} == {
        (language, target) for language in ("en", "de") for target in (0.0, 1.0)
    }


def test_good_and_bad_count_alike_within_a_language() -> None:
    every = examples("en", 90, 10) + examples("de", 5, 15) + examples("th", 0, 4)
    weights = balance(every)
    assert weights.mean() == pytest.approx(1.0)
    for language in ("en", "de"):
        sums = [
            sum(w for w, e in zip(weights, every, strict=True) if (e.language, e.target) == c)
            for c in ((language, 0.0), (language, 1.0))
        ]
        assert sums[0] == pytest.approx(sums[1])
    assert np.ptp(weights[-4:]) == 0
