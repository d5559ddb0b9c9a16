"""A tokenizer in files: the Hugging Face layout, read and written, and the fields of GGUF.

Written: tokenizer.json (all that the Rust tokenizers need), tokenizer_config.json (special tokens,
eos, pad, chat template), vocab.json and merges.txt (for readers of the older form). Read: either
form, a template also from chat_template.jinja. transformers gives the same ids from the folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen2.common.errors import UserError
from qwen2.common.files import durable_write
from qwen2.tokenizer.tokenizer import END_OF_TEXT, PRE_TOKENS
from qwen2.tokenizer.vocabulary import check_merges, spell, unspell

if TYPE_CHECKING:
    from qwen2.tokenizer.tokenizer import Tokenizer

# GGUF's token types.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5

_PRE_TOKENIZER = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": PRE_TOKENS},
            "behavior": "Isolated",
            "invert": False,
        },
        {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
    ],
}
_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}


def read_folder(folder: Path) -> dict[str, Any]:
    """The arguments of `Tokenizer` from a folder in the Hugging Face layout.

    Raises:
        UserError: no tokenizer there, a broken file, another kind of tokenizer, merges that the
            ids do not imply, or an eos or pad that is no special token.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        with _reading(path):
            vocabulary, merges, added = _from_tokenizer_json(_read_object(path))
    elif (path := folder / "vocab.json").exists():
        vocabulary, merges, added = _read_object(path), _read_merges(folder / "merges.txt"), []
    else:
        raise UserError(f"{folder}: holds neither tokenizer.json nor vocab.json")

    config_path = folder / "tokenizer_config.json"
    config = _read_object(config_path) if config_path.exists() else {}
    with _reading(config_path):
        added += _added_in_config(config)
        eos = _token_text(config.get("eos_token")) or END_OF_TEXT
        pad = _token_text(config.get("pad_token"))
        template = _default_template(config.get("chat_template"))
    if (template_path := folder / "chat_template.jinja").exists():
        template = _read_text(template_path)

    special_tokens = {token: id_ for token, id_, _ in added}
    with _reading(path):
        for token, id_, _ in added:
            if special_tokens[token] != id_ or vocabulary.get(token, id_) != id_:
                raise UserError(f"token {token!r} has several ids")
        ranks = {unspell(t): int(id_) for t, id_ in vocabulary.items() if t not in special_tokens}
        check_merges(ranks, merges)
    return {
        "ranks": ranks,
        "special_tokens": special_tokens,
        "chat_template": template,
        "eos_token": eos,
        "pad_token": pad or _default_pad(special_tokens, eos),
        "user_defined": frozenset(token for token, _, control in added if not control),
    }


def read_gguf_fields(
    tokens: Sequence[str],
    token_types: Sequence[int],
    merges: Sequence[str],
    chat_template: str | None,
    eos_id: int | None,
    pad_id: int | None,
) -> dict[str, Any]:
    """The arguments of `Tokenizer` from GGUF's `tokenizer.ggml.*` fields.

    Tokens of the type "unused" pad the list to the rows of the embedding and are left out.

    Raises:
        UserError: lists that do not fit together, or as `read_folder`.
    """
    if len(tokens) != len(token_types):
        raise UserError(f"vocabulary: {len(tokens)} tokens but {len(token_types)} token types")
    ranks: dict[bytes, int] = {}
    special_tokens: dict[str, int] = {}
    for id_, (token, kind) in enumerate(zip(tokens, token_types, strict=True)):
        if kind == _UNUSED:
            continue
        if kind in (_CONTROL, _USER_DEFINED):
            known = special_tokens.setdefault(token, id_)
        else:
            known = ranks.setdefault(unspell(token), id_)
        if known != id_:
            raise UserError(f"vocabulary: token {token!r} has the ids {known} and {id_}")
    check_merges(ranks, [_parse_merge(merge) for merge in merges])

    text_of = {id_: token for token, id_ in special_tokens.items()}
    for use, named in (("eos", eos_id), ("pad", pad_id)):
        if named is not None and named not in text_of:
            raise UserError(f"vocabulary: the {use} id {named} is not that of a special token")
    eos = END_OF_TEXT if eos_id is None else text_of[eos_id]
    return {
        "ranks": ranks,
        "special_tokens": special_tokens,
        "chat_template": chat_template,
        "eos_token": eos,
        "pad_token": _default_pad(special_tokens, eos) if pad_id is None else text_of[pad_id],
        "user_defined": frozenset(
            t for id_, t in text_of.items() if token_types[id_] == _USER_DEFINED
        ),
    }


def gguf_fields(tokenizer: Tokenizer, size: int) -> tuple[list[str], list[int], list[str]]:
    """GGUF's tokens, token types and merges; ids without a token, up to `size`, are unused.

    Raises:
        UserError: a token is not made by merges.
    """
    tokens, types = [f"[PAD{id_}]" for id_ in range(size)], [_UNUSED] * size
    for spelled, id_ in tokenizer.ranks.items():
        tokens[id_], types[id_] = spell(spelled), _NORMAL
    for token, id_ in tokenizer.special_tokens.items():
        tokens[id_] = token
        types[id_] = _USER_DEFINED if token in tokenizer.user_defined else _CONTROL
    return tokens, types, [f"{spell(left)} {spell(right)}" for left, right in tokenizer.merges]


def write_folder(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the four files into `folder`, which is made if need be; see the module's docstring.

    Raises:
        UserError: the place cannot be written, or a token is not made by merges.
    """
    vocabulary = {spell(token): id_ for token, id_ in tokenizer.ranks.items()}
    merges = [f"{spell(left)} {spell(right)}" for left, right in tokenizer.merges]
    added = {
        id_: {
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token not in tokenizer.user_defined,
        }
        for token, id_ in sorted(tokenizer.special_tokens.items(), key=lambda item: item[1])
    }
    _write(
        folder / "tokenizer.json",
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": id_, **token} for id_, token in added.items()],
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": _PRE_TOKENIZER,
            "post_processor": _BYTE_LEVEL,
            "decoder": _BYTE_LEVEL,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": "",
                "end_of_word_suffix": "",
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocabulary,
                "merges": merges,
            },
        },
    )
    _write(folder / "vocab.json", vocabulary)
    durable_write(folder / "merges.txt", "\n".join(["#version: 0.2", *merges, ""]).encode())
    template = {} if tokenizer.chat_template is None else {"chat_template": tokenizer.chat_template}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "add_prefix_space": False,
        "added_tokens_decoder": {str(id_): token for id_, token in added.items()},
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokenizer.eos_token,
        "errors": "replace",
        "pad_token": tokenizer.pad_token,
        "split_special_tokens": False,
        "unk_token": None,
        **template,
    }
    _write(folder / "tokenizer_config.json", config)


# (token, id, whether it is a control token)
_Added = list[tuple[str, int, bool]]


def _from_tokenizer_json(
    data: dict[str, Any],
) -> tuple[dict[str, int], list[tuple[bytes, bytes]], _Added]:
    model = data["model"]
    if model["type"] != "BPE":
        raise UserError(f"its model is {model['type']}; only byte-level BPE is read")
    if data["normalizer"] != {"type": "NFC"}:
        raise UserError("its normalizer is not NFC, so it is not a tokenizer of Qwen2's kind")
    patterns = [part.get("pattern") for part in data["pre_tokenizer"].get("pretokenizers", [])]
    if patterns != [{"Regex": PRE_TOKENS}, None]:
        raise UserError("its pre-tokenizer is not Qwen2's regular expression")
    merges = [_parse_merge(merge) for merge in model["merges"]]
    added = [(t["content"], int(t["id"]), bool(t["special"])) for t in data["added_tokens"]]
    return model["vocab"], merges, added


def _added_in_config(config: dict[str, Any]) -> _Added:
    return [
        (token["content"], int(id_), bool(token["special"]))
        for id_, token in config.get("added_tokens_decoder", {}).items()
    ]


def _parse_merge(merge: str | list[str]) -> tuple[bytes, bytes]:
    """Both forms in use: "Ġ a" and ["Ġ", "a"]."""
    pair = merge.split(" ") if isinstance(merge, str) else merge
    if len(pair) != 2:
        raise UserError(f"merge {merge!r} is not of two tokens")
    return unspell(pair[0]), unspell(pair[1])


def _read_merges(path: Path) -> list[tuple[bytes, bytes]]:
    lines = _read_text(path).split("\n")
    with _reading(path):
        return [_parse_merge(line) for line in lines[lines[0].startswith("#version") :] if line]


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    """The text of a special token, which older files write as an object."""
    return token["content"] if isinstance(token, dict) else token


def _default_template(template: str | list[dict[str, str]] | None) -> str | None:
    """The template called "default" where a file has several."""
    if isinstance(template, list):
        return next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def _default_pad(special_tokens: Mapping[str, int], eos: str) -> str:
    return END_OF_TEXT if END_OF_TEXT in special_tokens else eos


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: broken JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a JSON object")
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _write(path: Path, data: dict[str, Any]) -> None:
    durable_write(path, (json.dumps(data, ensure_ascii=False, indent=2) + "\n").encode())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Say in one line which file is not as it should be."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not in the form of a tokenizer file: {error!r}") from None
