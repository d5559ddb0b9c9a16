"""The long-context stage: what it trains on, what comes out, resuming, and its measurement."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig, Yarn
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.extend import with_config
from qwen2.model.hub import load, load_config, load_model, save
from qwen2.pipeline import long_context as measured
from qwen2.pipeline.long_context import run_long_context
from qwen2.tokenizer import Tokenizer
from qwen2.tokens.loader import PackedLoader
from qwen2.tokens.shards import Shards
from qwen2.train.long_context import LongContextRecipe, build_loader, long_context, mix
from qwen2.train.pretrain import PretrainRecipe, pretrain

TRAINED, CONTEXT = 64, 128


@pytest.fixture
def init(data: Path, tmp_path: Path) -> Path:
    """A model trained on 64 positions at the base of 10,000, by its configuration."""
    config = ModelConfig(
        vocab_size=272, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        rope_theta=10_000.0, max_position_embeddings=TRAINED,
    )  # fmt: skip
    model = Qwen2(config)
    init_weights(model, torch.Generator().manual_seed(0))
    save(model, Tokenizer.load(data / "tokenizer"), tmp_path / "init")
    return tmp_path / "init"


@pytest.fixture
def longer(recipe: dict[str, Any], init: Path, data: Path) -> dict[str, Any]:
    """A recipe of 6 steps over documents of 66, 131, 196 and 261 tokens."""
    del recipe["model"]
    return recipe | {
        "stage": "long_context",
        "init": str(init),
        "context": CONTEXT,
        "rows": 1,
        "steps": 6,
        "long_tokens": 150,
        "long_share": 0.8,
        "held_out": str(data / "shards"),
    }


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def test_the_model_has_the_new_base_and_length(longer: dict[str, Any], init: Path) -> None:
    recipe = LongContextRecipe.parse(longer)
    result = long_context(recipe)
    assert result.model is not None
    model, _ = load(result.model)
    before = load_config(init)
    assert model.config == before.model_copy(
        update={"rope_theta": 1e6, "max_position_embeddings": CONTEXT}
    )
    assert LongContextRecipe.load(recipe.out / "recipe.yaml") == recipe
    assert long_context(recipe) == result, "a finished run is left as it is"


def test_it_is_pre_training_with_another_base_and_mixture(
    longer: dict[str, Any], init: Path, tmp_path: Path
) -> None:
    """Without a mixture, the losses are those of pre-training from the same weights and config."""
    recipe = LongContextRecipe.parse(longer | {"long_tokens": 1000})
    long_context(recipe)
    model, tokenizer = load(init)
    changed = with_config(model, rope_theta=1e6, max_position_embeddings=CONTEXT)
    save(changed, tokenizer, tmp_path / "changed")
    keys = set(PretrainRecipe.model_fields)
    plain = {key: value for key, value in longer.items() if key in keys} | {
        "stage": "pretrain",
        "init": str(tmp_path / "changed"),
        "out": str(tmp_path / "plain"),
    }
    pretrain(PretrainRecipe.parse(plain))
    assert losses(recipe.out) == losses(tmp_path / "plain")


def test_every_token_of_every_document_is_a_target(longer: dict[str, Any], init: Path) -> None:
    """Documents longer than the context are cut into pieces, long ones repeated, none dropped."""
    recipe = LongContextRecipe.parse(longer)
    shards = Shards(recipe.data)
    assert shards.lengths.max() > 2 * CONTEXT
    source = mix(recipe, load_config(init), shards)
    assert source.long_share > 0.8
    loader = PackedLoader(source, CONTEXT, 1, recipe.seed)
    seen: Counter[int] = Counter()
    for _ in range(-(-source.tokens // CONTEXT)):
        seen.update(next(loader).targets.tolist())
    wanted: Counter[int] = Counter()
    for number in range(len(source.lengths)):
        wanted.update(source.document(number).tolist())
    assert seen >= wanted
    assert seen.total() - wanted.total() < CONTEXT  # of the next epoch, in the last row
    assert seen[shards.index.end_of_text] >= len(source.lengths) > len(shards)


def test_packed_by_best_fit_long_documents_fill_rows(longer: dict[str, Any], init: Path) -> None:
    """Those of 261 tokens begin with two whole rows; the stream cuts them wherever a row ends."""
    config, shards = load_config(init), Shards(Path(longer["data"]))
    begins = {}
    for packing in ("stream", "best_fit"):
        recipe = LongContextRecipe.parse(longer | {"packing": packing})
        loader = build_loader(recipe, config, shards).current
        lengths = loader.source.lengths
        pieces = [piece for row in range(30) for piece in loader.row_pieces(row)]
        begins[packing] = {
            (p.start, p.stop)
            for p in pieces
            if p.document >= 0 and lengths[p.document] == 261 and p.start < 2 * CONTEXT
        }
    assert begins["best_fit"] == {(0, CONTEXT), (CONTEXT, 2 * CONTEXT)}
    assert len(begins["stream"]) > 2
    recipe = LongContextRecipe.parse(longer | {"packing": "best_fit", "held_out": None})
    assert long_context(recipe).finished


def test_long_is_what_init_is_trained_on_unless_the_recipe_says(
    longer: dict[str, Any], init: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards, config = Shards(Path(longer["data"])), load_config(init)
    recipe = LongContextRecipe.parse(longer | {"long_tokens": None})
    assert mix(recipe, config, shards).long_documents == 4
    assert "4 of 4 documents are long, 100% of the tokens: the data stay" in capsys.readouterr().err
    mix(LongContextRecipe.parse(longer | {"long_tokens": 999}), config, shards)
    assert "no document has 999 tokens: the data stay" in capsys.readouterr().err
    mix(LongContextRecipe.parse(longer), config, shards)
    assert "2 of 4 documents are long" in capsys.readouterr().err


def test_resumed_equals_never_interrupted(
    longer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses are bit-identical, and what `init` was like is not measured again."""
    straight = LongContextRecipe.parse(longer)
    run_long_context(straight)
    resumed = LongContextRecipe.parse(longer | {"out": str(tmp_path / "resumed")})
    shutil.copytree(straight.out, resumed.out)
    shutil.rmtree(resumed.out / "model")
    shutil.rmtree(resumed.out / "checkpoints" / "step-00000006")
    resumed.save(resumed.out / "recipe.yaml")
    figures = json.loads((resumed.out / "positions.json").read_text())
    (resumed.out / "positions.json").write_text(json.dumps({"before": figures["before"]}))
    asked: list[str | Path] = []

    def watched(name: str | Path, **options: Any) -> Qwen2:
        asked.append(name)
        return load_model(name, **options)

    monkeypatch.setattr(measured, "load_model", watched)
    result = run_long_context(resumed)
    assert losses(resumed.out) == losses(straight.out)
    assert asked == [result.model]
    assert json.loads((resumed.out / "positions.json").read_text()) == figures
    run_long_context(resumed)
    assert len(asked) == 1, "a finished run measures nothing"


def test_before_and_after_are_of_the_init_and_of_the_trained_model(longer: dict[str, Any]) -> None:
    result = run_long_context(LongContextRecipe.parse(longer))
    assert result.positions is not None
    figures = json.loads(result.positions.read_text())
    before, after = figures["before"], figures["after"]
    assert (before["rope_theta"], before["trained_length"]) == (10_000, TRAINED)
    assert (after["rope_theta"], after["trained_length"]) == (1_000_000, CONTEXT)
    assert before["documents"] == 3, "those of at least 128 tokens"
    assert before["edges"] == after["edges"] == list(range(0, CONTEXT + 1, CONTEXT // 32))
    assert sum(before["tokens"]) == 3 * CONTEXT
    assert max(after["nats"]) < min(before["nats"]), "it has learnt the held-out text by heart"
    root = ElementTree.parse(result.positions.with_suffix(".svg")).getroot()
    names = {text.text for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert "before: base 10,000, 64 tokens" in names
    assert "after: base 1,000,000, 128 tokens" in names


def test_nothing_held_out_nothing_measured(longer: dict[str, Any]) -> None:
    recipe = LongContextRecipe.parse(longer | {"held_out": None, "steps": 1})
    assert run_long_context(recipe).positions is None
    assert not (recipe.out / "positions.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": 32}, "is trained on 64 tokens already"),
        ({"init": "nowhere"}, "nowhere: no such folder"),
        ({"context": 300}, r"its longest document has 261 tokens, context is 300"),
        ({"held_out": "nowhere"}, r"nowhere: no shards.json"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    longer: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    recipe = LongContextRecipe.parse(longer | change)
    with pytest.raises(UserError, match=message):
        run_long_context(recipe)
    assert not recipe.out.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"long_share": 1.0}, "long_share"),
        ({"init": None}, "init"),
        ({"long_tokes": 5}, "did you mean 'long_tokens'"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused(
    longer: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        LongContextRecipe.parse(longer | change)


def test_out_of_another_stage_is_refused(longer: dict[str, Any]) -> None:
    recipe = LongContextRecipe.parse(longer | {"held_out": None, "steps": 1})
    long_context(recipe)
    plain = {key: value for key, value in longer.items() if key in PretrainRecipe.model_fields}
    asked = PretrainRecipe.parse(plain | {"stage": "pretrain", "context": 16})
    with pytest.raises(UserError, match="holds a run of stage long_context, not pretrain"):
        pretrain(asked)
    with pytest.raises(UserError, match=r"another rope_theta \(1000000.0, now 500000.0\)"):
        long_context(recipe.model_copy(update={"rope_theta": 500_000.0}))


def test_a_way_to_extend_without_training_is_left_behind(
    longer: dict[str, Any], init: Path, tmp_path: Path
) -> None:
    model, tokenizer = load(init)
    yarn = Yarn(factor=2, original_max_position_embeddings=TRAINED)
    save(with_config(model, yarn=yarn.model_dump()), tokenizer, tmp_path / "yarn")
    recipe = LongContextRecipe.parse(longer | {"init": str(tmp_path / "yarn"), "steps": 1})
    result = run_long_context(recipe)
    assert result.model is not None
    assert load_config(result.model).yarn is None


def test_a_changed_configuration_shares_the_parameters(init: Path) -> None:
    model, _ = load(init)
    changed = with_config(model, rope_theta=5.0)
    assert (model.config.rope_theta, changed.config.rope_theta) == (10_000.0, 5.0)
    assert changed.lm_head.weight is changed.model.embed_tokens.weight
    for one, other in zip(model.parameters(), changed.parameters(), strict=True):
        assert one.data_ptr() == other.data_ptr()
        assert other.requires_grad
    with pytest.raises(UserError, match="did you mean 'rope_theta'"):
        with_config(model, rope_teta=5.0)
