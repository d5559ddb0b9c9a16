"""Records of instructions as documents: every format, every name, nothing silent."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from qwen2.corpus.documents import read_documents
from qwen2.corpus.split import split_key
from qwen2.synthesis import SynthesisRecipe, synthesize
from qwen2.synthesis.instructions import formats

RECORDS: list[Any] = [
    {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
    {"prompt": "Name a colour.", "response": "Blue."},
    {"question": "Who?", "answer": "She."},
    {"messages": [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"},
        {"role": "assistant", "content": "See you {{ 7 * 7 }}"},
    ]},
]  # fmt: skip
BAD = [
    ("{", "not JSON"),
    ("[1]", "not a JSON object"),
    ('{"instruction": "x"}', "no text in output or response"),
    ('{"instruction": 3, "output": "y"}', "no text in instruction or prompt"),
    ('{"messages": [{"role": "tool", "content": "x"}]}', "role is none of"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "not a question and its answer"),
    ('{"messages": "x"}', "no list of objects"),
]


def test_records_become_documents_and_bad_lines_are_told(tmp_path: Path) -> None:
    many = [{"instruction": f"Say {i}.", "output": str(i)} for i in range(60)]
    lines = [json.dumps(record) for record in RECORDS + many] + [line for line, _ in BAD]
    with gzip.open(tmp_path / "tasks.jsonl.gz", "wt") as file:
        file.write("\n".join(lines))
    source = {"name": "tasks", "path": str(tmp_path / "tasks.jsonl.gz"), "licence": "CC0-1.0"}
    recipe = SynthesisRecipe.parse({"instructions": [source]})
    outcome = synthesize(recipe, tmp_path / "out")
    assert outcome.summary is not None
    tally = outcome.summary["tasks"]["tasks"]
    assert (tally["records"], tally["kept"]) == (64 + len(BAD), 64)
    documents = list(read_documents(tmp_path / "out/documents/documents.parquet"))
    for document, record in zip(documents, RECORDS + many, strict=True):
        assert (document.kind, document.licence) == ("instruction", "CC0-1.0")
        said = [turn["content"] for turn in record.get("messages", [])] or list(record.values())
        assert all(text in document.text for text in said)
    assert (
        len({d.metadata["synthesis"]["format"] for d in documents})
        == len(formats()[0]["tasks"]) + 1
    )
    assert documents[0].id == "tasks:tasks.jsonl.gz:1"
    rejected = list(read_documents(tmp_path / "out/rejected/rejected.parquet"))
    for document, (_, reason) in zip(rejected, BAD, strict=True):
        assert reason in document.metadata["synthesis"]["reason"]
    before = (tmp_path / "out/documents/documents.parquet").read_bytes()
    synthesize(recipe, tmp_path / "out")
    assert (tmp_path / "out/documents/documents.parquet").read_bytes() == before


def test_one_question_is_on_one_side_of_a_split(tmp_path: Path) -> None:
    lines = [json.dumps({"instruction": "Say it.", "output": str(i)}) for i in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    recipe = SynthesisRecipe.parse({"instructions": [{"name": "t", "path": str(tmp_path)}]})
    synthesize(recipe, tmp_path / "out")
    documents = list(read_documents(tmp_path / "out/documents/documents.parquet"))
    assert len({d.id for d in documents}) == 3
    assert len({split_key(d) for d in documents}) == 1


def test_every_format_has_the_question_before_the_answer() -> None:
    values = {"instruction": "INSTRUCTION", "input": "INPUT", "output": "OUTPUT"}
    for form, templates in formats()[0].items():
        for template in templates:
            if form == "conversations":
                turns = [{"role": r, "content": c} for r, c in (("user", "Q"), ("assistant", "A"))]
                text = template.render({"turns": turns})
                assert 0 <= text.rfind("Q") < text.rfind("A")
            else:
                text = template.render(values)
                places = [text.index(value) for value in values.values()]
                assert max(places) == places[2]
                assert "INPUT" not in template.render({**values, "input": ""})
                assert "Input" not in template.render({**values, "input": ""})
