"""What can be looked at: shards, a run, a recipe; and the command that does it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from qwen2.cli.main import app
from qwen2.common.errors import UserError
from qwen2.common.files import sha256_of
from qwen2.pipeline.batches import open_batches
from qwen2.tokenizer import Tokenizer
from qwen2.tokens import Encoded, Origin, write_shards
from qwen2.train.pretrain import PretrainRecipe, build_loader

BYTES = Tokenizer.from_ranks(
    {bytes([value]): value for value in range(256)},
    {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the quickstart leaves it: tokenizer/, shards/train, shards/held-out."""
    folder = tmp_path_factory.mktemp("run")
    BYTES.save(folder / "tokenizer")
    for part, count in (("train", 30), ("held-out", 2)):
        documents = [
            Encoded("ab"[n % 2], BYTES.encode(f"document {n} " * (n + 1)), Origin(f"id/{n}", "s"))
            for n in range(count)
        ]
        write_shards(
            folder / "shards" / part,
            documents,
            vocab_size=BYTES.vocab_size,
            end_of_text=BYTES.end_of_text_id,
            tokenizer=sha256_of(folder / "tokenizer" / "tokenizer.json"),
        )
    recipe = {
        "model": {
            "vocab_size": 272, "hidden_size": 32, "intermediate_size": 48,
            "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
        },
        "data": str(folder / "shards/train"), "tokenizer": str(folder / "tokenizer"),
        "out": str(folder / "out"), "context": 32, "rows": 2, "accumulation": 3, "steps": 4,
        "optimizer": {"lr": 0.01}, "weights": {"a": 0.25, "b": 0.75}, "packing": "best_fit",
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def shown(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["corpus", "show", *map(str, arguments), "--json"])
    assert done.exit_code == 0, done.exception
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def ids(result: dict[str, Any]) -> list[list[int]]:
    return [[i for piece in row for i in piece["ids"]] for row in result["rows"]]


def test_a_step_of_a_recipe_is_what_training_reads(run: Path) -> None:
    recipe = PretrainRecipe.load(run / "recipe.yaml")
    shards = open_batches(str(run / "recipe.yaml")).shards
    for rank in (0, 1):
        loader = build_loader(recipe, shards, rank, 2)
        for step in (1, 2, 3):
            batches = [next(loader) for _ in range(recipe.accumulation)]
            targets = [t for batch in batches for t in batch.targets.tolist() if t >= 0]
            result = shown(run / "recipe.yaml", "--step", step, "--rank", rank, "--world-size", 2)
            assert result["title"] == f"Step {step}, rank {rank} of 2"
            assert [i for row in ids(result) for i in row] == targets


def test_a_folder_of_a_run_or_shards_or_above_them(run: Path) -> None:
    out = run / "out"
    out.mkdir()
    shutil.copy(run / "recipe.yaml", out / "recipe.yaml")
    assert shown(out) == shown(run / "recipe.yaml")
    assert shown(run / "shards", "rows=2") == shown(run / "shards/train", "rows=2")
    plain = shown(run / "shards/train", "context=16", "rows=3", "weights={a: 1}", "seed=2")
    assert [len(row) for row in ids(plain)] == [16] * 3
    assert {piece["kind"] for row in plain["rows"] for piece in row} == {"a"}


def test_one_document_by_number_and_by_id(run: Path) -> None:
    by_number = shown(run / "shards/train", "--document", 5)
    assert by_number == shown(run / "shards/train", "--id", "id/5")
    piece = by_number["rows"][0][0]
    assert piece["text"] == "document 5 " * 6 + "<|endoftext|>"
    assert piece["origin"]["id"] == "id/5"


def test_plain_text_and_a_page(run: Path, tmp_path: Path) -> None:
    runner, shards = CliRunner(), str(run / "shards/train")
    plain = runner.invoke(app, ["corpus", "show", shards, "--document", "1"])
    assert "b, document 1, all 23 tokens" in plain.stdout
    assert "document 1 document 1 <|endoftext|>" in plain.stdout
    assert "id/1 · s" in plain.stdout
    assert "\x1b" not in plain.stdout
    page = tmp_path / "page.html"
    done = runner.invoke(app, ["corpus", "show", shards, "--html", str(page)])
    assert done.stdout.strip() == str(page)
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["shards/train", "contxt=3"], "unknown key 'contxt'; did you mean 'context'"),
        (["shards/train", "--document", "30"], "document 30: .* has 30, from 0 on"),
        (["shards/train", "--id", "no"], "no document with id 'no'"),
        (["shards/train", "--id", "no", "--document", "1"], "give either --document or --id"),
        (["shards/train", "--rank", "2", "--world-size", "2"], "rank 2 of 2"),
        (["tokenizer"], "neither shards .* nor a training run"),
        (["recipe.yaml", "stage=dpo"], "stage 'dpo' reads no shards"),
        (["nothing"], "no such file"),
    ],
)
def test_what_cannot_be_shown_is_named(run: Path, arguments: list[str], message: str) -> None:
    where, *rest = arguments
    done = CliRunner().invoke(app, ["corpus", "show", str(run / where), *rest])
    assert isinstance(done.exception, UserError)
    assert re.search(message, str(done.exception)), done.exception


def test_a_tokenizer_that_is_not_near_is_asked_for(run: Path, tmp_path: Path) -> None:
    far = tmp_path / "far"
    shutil.copytree(run / "shards/train", far)
    with pytest.raises(UserError, match="give --tokenizer"):
        open_batches(str(far))
    assert open_batches(str(far), tokenizer=run / "tokenizer").tokenizer.vocab_size == 259
