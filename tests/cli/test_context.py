"""--context: the right thing is turned on without editing a file, and said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from qwen2.cli.main import app
from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hub import load, save
from qwen2.tokenizer import Tokenizer

BYTES = Tokenizer.from_ranks(
    {bytes([value]): value for value in range(256)},
    {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258},
)
LONG = "abcdefgh" * 40  # 320 tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, trained for 64 tokens as its configuration says."""
    config = ModelConfig(
        vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = Qwen2(config)
    init_weights(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.lm_head.weight[256:] = 0
    folder = tmp_path_factory.mktemp("model") / "random"
    save(model, BYTES, folder)
    return folder


def run(*arguments: object) -> tuple[dict[str, object], str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    return json.loads(result.stdout), result.stderr


def test_generate_beyond_the_trained_length(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    with pytest.raises(UserError, match="model's context 64"):
        run("generate", folder, "-p", LONG, "--json")
    out, said = run("generate", folder, "-p", LONG, "-n", 9, "--json", "--context", 512)
    assert len(out["token_ids"]) == 9  # type: ignore[arg-type]
    assert "context 512 tokens: dual chunk attention (chunks of 64, window 4)" in said
    assert (folder / "config.json").read_text() == config


def test_short_prompts_are_answered_alike_unless_yarn_is_asked_for(folder: Path) -> None:
    common = ("generate", folder, "-p", "ab", "-n", 40, "--json")
    plain, said = run(*common)
    assert "context" not in said
    extended, _ = run(*common, "--context", 512)
    assert extended["token_ids"] == plain["token_ids"]
    _, said = run(*common, "--context", 512, "--extend", "yarn")
    assert "static YARN, factor 8 over 64" in said


def test_score_sees_as_far_as_it_is_told(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(LONG)
    scores = {}
    for extend in ("dca+yarn", "yarn", "none"):
        out, said = run(
            "score", folder, tmp_path / "long.txt", "--json", "--context", 512, "--extend", extend
        )
        assert "context 512 tokens: " in said
        scores[extend] = out["bits_per_byte"]
    assert "beyond the 64 tokens of training" in said
    assert len(set(scores.values())) == 3
    capped, _ = run("score", folder, tmp_path / "long.txt", "--json")
    assert capped["bits_per_byte"] not in scores.values()


def test_a_checkpoint_that_names_its_chunks_is_run_with_them(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    values = json.loads((copy / "config.json").read_text())
    values["dual_chunk_attention_config"] = {
        "chunk_size": 32, "local_size": 8, "original_max_position_embeddings": 64
    }  # fmt: skip
    values["max_position_embeddings"] = 512
    (copy / "config.json").write_text(json.dumps(values))
    model, tokenizer = load(copy)
    assert model.config.dual_chunk is not None
    assert model.config.dual_chunk.chunk_size == 32
    save(model, tokenizer, tmp_path / "again")
    assert load(tmp_path / "again")[0].config.dual_chunk == model.config.dual_chunk


def test_an_unknown_way_is_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match="extend 'rope': choose one of"):
        run("generate", folder, "-p", "x", "--json", "--context", 512, "--extend", "rope")
