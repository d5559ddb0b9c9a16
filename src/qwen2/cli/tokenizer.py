"""`qwen2 tokenizer`: train a vocabulary, encode and decode, compare compression by language."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from qwen2.tokenizer import Tokenizer

app = typer.Typer(help="Byte-level BPE: train, encode, decode, compare.", no_args_is_help=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Folder = Annotated[
    Path | None,
    typer.Option("--tokenizer", help="Folder in the Hugging Face layout; Qwen2's own by default."),
]


@app.command()
def train(
    files: Annotated[list[Path], typer.Argument(help="Text files, or folders of them.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens, control tokens included.")],
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    as_json: Json = False,
) -> None:
    """Train a vocabulary on FILES and write it in the Hugging Face layout."""
    from qwen2.common.files import durable_folder
    from qwen2.tokenizer.compare import read_texts
    from qwen2.tokenizer.train import train_bpe

    with durable_folder(out) as partial:
        tokenizer = train_bpe((text for _, text in read_texts(files)), vocab_size)
        tokenizer.save(partial)
    print(json.dumps({"out": str(out), "vocab_size": vocab_size}) if as_json else str(out))


@app.command()
def encode(
    text: Annotated[str | None, typer.Argument(help="The text; standard input without it.")] = None,
    folder: Folder = None,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read <|im_end|> and the like as tokens.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the token ids of a text."""
    if text is None:
        text = sys.stdin.buffer.read().decode(errors="replace")
    ids = _load(folder).encode(text, parse_special=parse_special)
    print(json.dumps({"ids": ids}) if as_json else " ".join(map(str, ids)))


@app.command()
def decode(
    ids: Annotated[
        list[int] | None, typer.Argument(help="Token ids; standard input without them.")
    ] = None,
    folder: Folder = None,
    skip_special: Annotated[
        bool, typer.Option("--skip-special", help="Leave control tokens out.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Print the text of token ids."""
    from qwen2.common.errors import UserError

    if not ids:
        try:
            ids = [int(word) for word in sys.stdin.read().split()]
        except ValueError as error:
            raise UserError(f"standard input: token ids are whole numbers ({error})") from None
    text = _load(folder).decode(ids, skip_special=skip_special)
    print(json.dumps({"text": text}) if as_json else text)


@app.command()
def compare(
    paths: Annotated[
        list[Path], typer.Argument(help="Text files or folders; a folder's name is its language.")
    ],
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(
            help="Another tokenizer (repeatable): a folder in the Hugging Face layout, a "
            ".json or .tiktoken file, or a name that tiktoken knows."
        ),
    ] = None,
    language: Annotated[str | None, typer.Option(help="One label for all the text.")] = None,
    as_json: Json = False,
) -> None:
    """Bytes per token by language, of Qwen2's vocabulary and others; more is better."""
    from qwen2.tokenizer import Tokenizer
    from qwen2.tokenizer import compare as measure

    encoders: dict[str, measure.BatchEncoder] = {"qwen2": Tokenizer.qwen2()}
    encoders |= {name: measure.open_tokenizer(name) for name in tokenizer or ()}
    texts = measure.texts_by_language(paths, language)
    figures = measure.compare(encoders, texts)
    if as_json:
        size = {lang: sum(len(text.encode()) for text in some) for lang, some in texts.items()}
        rows = {lang: {"bytes": size[lang], "bytes_per_token": figures[lang]} for lang in texts}
        print(json.dumps({"languages": rows}, ensure_ascii=False))
        return
    width = max(map(len, ["language", *figures]))
    print("  ".join([f"{'language':{width}}", *encoders]))
    for lang, row in figures.items():
        print("  ".join([f"{lang:{width}}", *(f"{row[name]:{len(name)}.3f}" for name in encoders)]))


def _load(folder: Path | None) -> Tokenizer:
    from qwen2.tokenizer import Tokenizer

    return Tokenizer.qwen2() if folder is None else Tokenizer.load(folder)
