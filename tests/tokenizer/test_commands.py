"""`qwen2 tokenizer …` from the outside."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwen2.cli.tokenizer import app
from qwen2.common.errors import UserError
from qwen2.tokenizer import Tokenizer


def run(*arguments: str, stdin: str | None = None) -> str:
    result = CliRunner().invoke(app, list(arguments), input=stdin, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_encode() -> None:
    assert run("encode", "The capital of France") == "785 6722 315 9625\n"
    assert json.loads(run("encode", "--json", stdin="e\u0301")) == {"ids": [963]}
    assert json.loads(run("encode", "--parse-special", "--json", "<|im_end|>")) == {"ids": [151645]}


def test_decode() -> None:
    assert run("decode", "785", "6722") == "The capital\n"
    assert json.loads(run("decode", "--json", stdin="963\n151645 ")) == {"text": "é<|im_end|>"}
    assert run("decode", "963", "151645", "--skip-special") == "é\n"
    with pytest.raises(UserError, match="token id 151646"):
        run("decode", "151646")
    with pytest.raises(UserError, match="whole numbers"):
        run("decode", stdin="x")


def test_train_then_compare(tmp_path: Path) -> None:
    text, out = tmp_path / "en" / "text.txt", tmp_path / "made"
    text.parent.mkdir()
    text.write_text("the theme of these things " * 50)
    told = json.loads(run("train", str(text), "--vocab-size", "270", "--out", str(out), "--json"))
    assert told == {"out": str(out), "vocab_size": 270}
    assert Tokenizer.load(out).vocab_size == 270
    assert run("encode", "the", "--tokenizer", str(out)).split() == [
        str(id_) for id_ in Tokenizer.load(out).encode("the")
    ]

    table = run("compare", str(tmp_path / "en"), "--tokenizer", str(out)).splitlines()
    assert table[0].split() == ["language", "qwen2", str(out)]
    compared = json.loads(run("compare", str(text), "--tokenizer", str(out), "--json"))
    row = compared["languages"]["en"]
    assert row["bytes"] == text.stat().st_size
    figures = [row["bytes_per_token"][name] for name in ("qwen2", str(out))]
    assert table[1].split() == ["en", *(f"{figure:.3f}" for figure in figures)]


def test_train_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    arguments = ["--vocab-size", "300", "--out", str(tmp_path / "made")]
    with pytest.raises(UserError, match=r"none\.txt: cannot be read"):
        run("train", str(tmp_path / "none.txt"), *arguments)
    assert not any(tmp_path.iterdir())


def test_importing_the_commands_is_light() -> None:
    code = (
        "import sys, qwen2.cli.tokenizer; print({'torch', 'tiktoken', 'jinja2'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
