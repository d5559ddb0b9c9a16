"""Tokenizers in files: written for transformers, read back, and refused when broken."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen2.common.errors import UserError
from qwen2.tokenizer import Tokenizer
from qwen2.tokenizer.vocabulary import parse_tiktoken, spell, unspell

TEXT = "héllo e\u0301 <|im_end|> <tool_call> it's 123\n\n  x 漢字"
BYTES = {bytes([byte]): byte for byte in range(256)}
TINY = {**BYTES, b"ab": 256, b"abc": 257}
SPECIAL = {"<|endoftext|>": 258}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    Tokenizer.from_ranks(TINY, SPECIAL).save(folder)
    return folder


def test_the_published_file_is_unchanged() -> None:
    import qwen2.tokenizer

    path = Path(qwen2.tokenizer.__file__).with_name("data") / "qwen.tiktoken"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"


def test_recovers_the_published_merges(qwen: Tokenizer) -> None:
    assert len(qwen.merges) == 151_387
    assert qwen.merges[:3] == [(b" ", b" "), (b"  ", b"  "), (b"i", b"n")]
    assert [qwen.ranks[left + right] for left, right in qwen.merges] == list(range(256, 151_643))


@pytest.mark.real
def test_equals_the_real_checkpoint(qwen: Tokenizer, real_fields: dict[str, Any]) -> None:
    tokens, types, merges, template, eos, pad = (
        real_fields[f"tokenizer.{name}"]
        for name in (
            *("ggml.tokens", "ggml.token_type", "ggml.merges"),
            *("chat_template", "ggml.eos_token_id", "ggml.padding_token_id"),
        )
    )
    real = Tokenizer.from_gguf_fields(tokens, types, merges, template, eos, pad)
    assert real.ranks == qwen.ranks
    assert [f"{spell(left)} {spell(right)}" for left, right in qwen.merges] == merges
    assert (real.vocab_size, len(tokens)) == (151_665, 151_936)
    assert (real.eos_token, real.pad_token) == ("<|im_end|>", "<|endoftext|>")
    assert real.user_defined == {"<tool_call>", "</tool_call>"}


def test_spelling_is_one_to_one() -> None:
    every_byte = bytes(range(256))
    assert unspell(spell(every_byte)) == every_byte
    assert len(set(spell(every_byte))) == 256
    assert spell(b" a\n") == "ĠaĊ"
    with pytest.raises(UserError, match="byte-level spelling"):
        unspell("漢")


def test_saved_then_loaded_is_equal(qwen: Tokenizer, saved: Path, tmp_path: Path) -> None:
    assert Tokenizer.load(saved) == qwen
    names = {path.name for path in saved.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"}
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(saved / name, tmp_path)
    assert Tokenizer.load(tmp_path) == qwen


def test_extra_tokens_are_kept(extended: Tokenizer, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    extended.save(tmp_path)
    assert Tokenizer.load(tmp_path) == extended
    oracle = AutoTokenizer.from_pretrained(tmp_path)
    ids = extended.encode(TEXT, parse_special=True)
    assert {151645, 151657} < set(ids)
    assert oracle(TEXT)["input_ids"] == ids
    assert oracle.decode(ids, skip_special_tokens=True) == extended.decode(ids, skip_special=True)
    assert (oracle.eos_token_id, oracle.pad_token_id) == (151645, 151643)


def test_reads_what_transformers_writes(qwen: Tokenizer, huggingface: Any, tmp_path: Path) -> None:
    huggingface.save_pretrained(tmp_path)
    assert (tmp_path / "chat_template.jinja").exists()
    assert Tokenizer.load(tmp_path) == qwen


def test_control_tokens_may_come_first(tmp_path: Path) -> None:
    """As the Hugging Face trainer numbers them; they stand in the vocabulary too."""
    ranks = {token: id_ + 1 for token, id_ in TINY.items()}
    tokenizer = Tokenizer.from_ranks(ranks, {"<|endoftext|>": 0})
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"]["<|endoftext|>"] = 0
    data["model"]["merges"] = [merge.split() for merge in data["model"]["merges"]]
    path.write_text(json.dumps(data))
    assert Tokenizer.load(tmp_path) == tokenizer
    assert tokenizer.encode("abcab") == [258, 257]


def _json(name: str, change: Callable[[Any], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = json.loads((folder / name).read_text())
        change(data)
        (folder / name).write_text(json.dumps(data))

    return apply


def _tokenizer(change: Callable[[Any], object]) -> Callable[[Path], None]:
    return _json("tokenizer.json", change)


def _only_vocab(change: Callable[[Path], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        change(folder)

    return apply


BREAKAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no files": (lambda f: shutil.rmtree(f), "neither tokenizer.json nor vocab.json"),
    "cut off": (
        lambda f: (f / "tokenizer.json").write_text((f / "tokenizer.json").read_text()[:900]),
        "tokenizer.json: broken JSON",
    ),
    "a list": (lambda f: (f / "tokenizer.json").write_text("[]"), "expected a JSON object"),
    "no UTF-8": (lambda f: (f / "tokenizer.json").write_bytes(b"\xff"), "cannot be read"),
    "no model": (_tokenizer(lambda d: d.pop("model")), "not in the form .*'model'"),
    "unigram": (_tokenizer(lambda d: d["model"].update(type="Unigram")), "is Unigram"),
    "no NFC": (_tokenizer(lambda d: d.update(normalizer=None)), "not NFC"),
    "other expression": (
        _tokenizer(lambda d: d["pre_tokenizer"]["pretokenizers"].pop(0)),
        "not Qwen2's regular expression",
    ),
    "missing merges": (_tokenizer(lambda d: d["model"]["merges"].pop()), "1 merges for 2 tokens"),
    "merges in another order": (
        _tokenizer(lambda d: d["model"]["merges"].reverse()),
        "merge 'a b' is not in the order of the ids",
    ),
    "merge of no token": (
        _tokenizer(lambda d: d["model"]["merges"].append("x y")),
        "merge 'x y' is not of tokens",
    ),
    "merge of three": (
        _tokenizer(lambda d: d["model"]["merges"].append("x y z")),
        "merge 'x y z' is not of two",
    ),
    "duplicate ids": (
        _tokenizer(lambda d: d["model"]["vocab"].update({"abc": 256})),
        "merge 'ab c' is not in the order",
    ),
    "id of a special token": (
        _tokenizer(lambda d: d["added_tokens"][0].update(id=257)),
        "token '<|endoftext|>' has several ids",
    ),
    "gap": (_tokenizer(lambda d: d["model"]["vocab"].update({"abc": 300})), "id 257 has no token"),
    "missing byte": (_tokenizer(lambda d: d["model"]["vocab"].pop("!")), "byte 0x21 has no token"),
    "id that is no number": (
        _tokenizer(lambda d: d["model"]["vocab"].update(abc="x")),
        "tokenizer.json: not in the form",
    ),
    "unknown eos": (
        _json("tokenizer_config.json", lambda d: d.update(eos_token="<|end|>")),
        "eos token '<|end|>': not among the special tokens",
    ),
    "no merges.txt": (_only_vocab(lambda f: (f / "merges.txt").unlink()), "merges.txt: missing"),
    "broken merges.txt": (
        _only_vocab(lambda f: (f / "merges.txt").write_text("a b\nabc\n")),
        "merges.txt: merge 'abc' is not of two tokens",
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_broken_folders_are_refused_in_one_line(tiny: Path, name: str) -> None:
    Tokenizer.load(tiny)
    breakage, message = BREAKAGES[name]
    breakage(tiny)
    with pytest.raises(UserError, match=message) as caught:
        Tokenizer.load(tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "special_tokens", "message"),
    [
        ({**TINY, b"abcd": 257}, SPECIAL, "id 257 is given to b'abc' and to b'abcd'"),
        (TINY, {"<|endoftext|>": 257}, "id 257 is given to b'abc' and to '<|endoftext|>'"),
        ({**TINY, b"": 259}, SPECIAL, "a token is empty"),
        ({**TINY, b"abc": -1}, SPECIAL, "has the id -1"),
        (TINY, {}, "eos token '<|endoftext|>': not among"),
    ],
)
def test_broken_ranks(
    ranks: dict[bytes, int], special_tokens: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Tokenizer.from_ranks(ranks, special_tokens)


def test_tokens_without_merges_cannot_be_saved(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_ranks({**BYTES, b"abc": 256}, {"<|endoftext|>": 257})
    with pytest.raises(UserError, match="no merge of lower tokens makes token 256, b'abc'"):
        tokenizer.save(tmp_path)


GGUF: dict[str, Any] = {
    "tokens": [spell(token) for token in TINY] + ["<|endoftext|>", "<tool_call>", "[PAD260]"],
    "token_types": [1] * 258 + [3, 4, 5],
    "merges": ["a b", "ab c"],
}


def test_gguf_fields() -> None:
    tokenizer = Tokenizer.from_gguf_fields(**GGUF, chat_template="x", eos_id=258)
    assert tokenizer == Tokenizer(
        TINY,
        {"<|endoftext|>": 258, "<tool_call>": 259},
        chat_template="x",
        user_defined=frozenset({"<tool_call>"}),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"token_types": [1]}, "261 tokens but 1 token types"),
        ({"merges": []}, "0 merges for 2 tokens"),
        ({"eos_id": 260}, "the eos id 260 is not that of a special token"),
        ({"pad_id": 5}, "the pad id 5 is not that of a special token"),
        ({"tokens": [*GGUF["tokens"][:257], "ab", *GGUF["tokens"][258:]]}, "'ab' has the ids"),
    ],
)
def test_broken_gguf_fields(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Tokenizer.from_gguf_fields(**{**GGUF, **change})


def test_tiktoken_files() -> None:
    assert parse_tiktoken(b"YQ== 0\nYg== 1\n", "x") == {b"a": 0, b"b": 1}
    for data in (b"YQ==", b"YQ== x", b"Y 1", b"YQ== 0\nYQ== 1", b"\xff\xff 1"):
        with pytest.raises(UserError, match=r"x, line \d: "):
            parse_tiktoken(data, "x")
