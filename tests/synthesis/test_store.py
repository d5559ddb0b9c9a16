"""Answers survive whatever happens to the process and to the file's end."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.synthesis.generator import Answer, digest
from qwen2.synthesis.store import AnswerLog, Answers, claimed

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@settings(max_examples=40)
@given(st.lists(TEXTS, min_size=1, max_size=8), st.data())
def test_a_segment_cut_anywhere_loses_its_last_line_alone(
    texts: list[str], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as name:
        log = AnswerLog(Path(name))
        ends = [0]
        for i, text in enumerate(texts):
            log.add(digest(i), Answer(text, "stop", i, 2))
            ends.append(log.path.stat().st_size)
        log.close()
        cut = data.draw(st.integers(0, ends[-1]))
        log.path.write_bytes(log.path.read_bytes()[:cut])
        answers = Answers(Path(name))
        whole = sum(end <= cut for end in ends[1:])
        found = [answers.get(digest(i)) for i in range(len(texts))]
        assert found == [
            Answer(text, "stop", i, 2) if i < whole else None for i, text in enumerate(texts)
        ]
        assert answers.damaged == (cut not in ends)
        # The next start writes into a segment of its own, and the torn line stays harmless.
        again = AnswerLog(Path(name))
        again.add(digest(99), Answer("later", "stop"))
        assert again.path != log.path
        assert Answers(Path(name)).get(digest(99)) == Answer("later", "stop")


@settings(max_examples=60)
@given(st.data())
def test_no_changed_byte_passes_for_an_answer(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        log = AnswerLog(Path(name))
        for i in range(3):
            log.add(digest(i), Answer(f"text {i}", "stop"))
        content = bytearray(log.path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        log.path.write_bytes(content)
        answers = Answers(Path(name))
        found = [answers.get(digest(i)) for i in range(3)]
        assert all(f in (None, Answer(f"text {i}", "stop")) for i, f in enumerate(found))
        assert found.count(None) >= 1
        assert answers.damaged >= 1


def test_the_last_line_of_a_key_counts_also_across_segments(tmp_path: Path) -> None:
    for text in ("first", "second", "third"):
        log = AnswerLog(tmp_path)
        log.add(digest("key"), Answer(text, "stop"))
        log.add(digest(text), Answer("other", "stop"))
        log.close()
    assert Answers(tmp_path).get(digest("key")) == Answer("third", "stop")


def test_keys_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    log = AnswerLog(tmp_path)
    keys = ["0" * 16 + f"{i:016x}" for i in range(5)]
    for key in keys:
        log.add(key, Answer(key, "stop"))
    answers = Answers(tmp_path)
    assert [getattr(answers.get(key), "text", None) for key in keys] == keys
    assert answers.get("0" * 16 + "f" * 16) is None


def test_a_log_without_answers_makes_no_file(tmp_path: Path) -> None:
    AnswerLog(tmp_path).close()
    assert not list(tmp_path.iterdir())


def test_two_processes_never_share_a_folder(tmp_path: Path) -> None:
    with (
        claimed(tmp_path),
        pytest.raises(UserError, match="another process is at work"),
        claimed(tmp_path),
    ):
        pass
    with claimed(tmp_path):
        pass
