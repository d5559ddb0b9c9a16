"""Bytes per token by language, and the tokenizers it is measured with."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import pytest
import tiktoken

from qwen2.common.errors import UserError
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.compare import bytes_per_token, compare, open_tokenizer, texts_by_language


def test_bytes_per_token_by_hand(qwen: Tokenizer) -> None:
    assert qwen.encode("é") == [963]
    assert bytes_per_token(qwen, ["é"]) == 2
    assert bytes_per_token(qwen, ["é", "1234"]) == 6 / 5
    with pytest.raises(UserError, match="no text"):
        bytes_per_token(qwen, [""])


def test_all_kinds_of_tokenizers_agree(qwen: Tokenizer, saved: Path, tmp_path: Path) -> None:
    texts = ["control tokens <|im_end|> are text", "été 漢字 12\n\n  x"]
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    plain = tmp_path / "qwen.tiktoken"
    plain.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in qwen.ranks.items()))
    for name in (saved, saved / "tokenizer.json", tmp_path, plain):
        assert open_tokenizer(str(name)).encode_batch(texts) == qwen.encode_batch(texts)


def test_names_that_tiktoken_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> tiktoken.Encoding:
        raise ConnectionError(name)

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="'o200k_base': tiktoken has to download it and could not"):
        open_tokenizer("o200k_base")


def test_unknown_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "x.tiktoken").write_text("x")
    for name, message in {
        "nothing": "neither a folder, a file, nor one of gpt2",
        str(tmp_path): "not a tokenizer.json",
        str(tmp_path / "none.json"): "not a tokenizer.json",
        str(tmp_path / "none.tiktoken"): "cannot be read",
        str(tmp_path / "x.tiktoken"): "line 1: not 'base64 rank'",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            open_tokenizer(name)


def test_a_files_language_is_its_folder(
    tmp_path: Path, qwen: Tokenizer, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"de/a.txt": "Straße", "fr/b.txt": "été", "fr/c.txt": "ça"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "fr/d.bin").write_bytes(b"\xff")
    texts = {"de": ["Straße"], "fr": ["été", "ça"]}
    assert texts_by_language([tmp_path]) == texts
    assert "d.bin: not UTF-8 text" in capsys.readouterr().err
    assert texts_by_language([tmp_path / "fr/b.txt"], "French") == {"French": ["été"]}
    assert compare({"ours": qwen}, texts)["fr"]["ours"] == bytes_per_token(qwen, texts["fr"])
    with pytest.raises(UserError, match="not UTF-8"):
        texts_by_language([tmp_path / "fr/d.bin"])
    with pytest.raises(UserError, match="no text in what was given"):
        texts_by_language([])
