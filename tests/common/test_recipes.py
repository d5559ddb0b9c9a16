"""Recipes are found as files and by name; those shipped are what the report states."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from qwen2.common.errors import UserError
from qwen2.common.recipes import find_recipe
from qwen2.model.attention import PackedAttention
from qwen2.model.config import PUBLISHED
from qwen2.model.decoder import Qwen2
from qwen2.train.long_context import LongContextRecipe
from qwen2.train.pretrain import PretrainRecipe


def test_a_file_wins_over_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = find_recipe("miniature")
    assert own == find_recipe("miniature.yaml")
    monkeypatch.chdir(tmp_path)
    Path("miniature.yaml").write_text("stage: pretrain\n")
    assert find_recipe("miniature.yaml") == Path("miniature.yaml")
    assert find_recipe("miniature") == own


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no such file; did you mean 'miniature'\? there are .*"):
        find_recipe("minature")


TABLE_1 = {  # pre-training tokens, parameters, parameters besides the embeddings
    "0.5b": (12e12, 494_032_768, 357_898_112),
    "1.5b": (7e12, 1_543_714_304, 1_310_340_608),
    "7b": (7e12, 7_615_616_512, 6_525_621_760),
    "57b-a14b": (4.5e12, 57_408_658_944, 56_319_581_696),
    "72b": (7e12, 72_706_203_648, 70_214_787_072),
}
DENSE = [name for name in TABLE_1 if PUBLISHED[name].moe is None]


def pretraining(name: str) -> PretrainRecipe:
    return PretrainRecipe.load(find_recipe(name))


def long_stage(name: str) -> LongContextRecipe:
    given = [f"init=out/{name}/model", f"out=out/{name}-long"]
    return LongContextRecipe.load(find_recipe("long_context"), given)


@pytest.mark.parametrize("name", TABLE_1)
def test_a_real_run_has_the_reports_tokens_and_context(name: str) -> None:
    recipe = pretraining(name)
    tokens = TABLE_1[name][0]
    assert 0 <= recipe.total_tokens - tokens < recipe.plan[0].step_tokens
    assert recipe.context == 4096
    stage = long_stage(name)
    assert (stage.context, stage.rope_theta) == (32_768, 1_000_000)
    assert stage.plan[0].step_tokens == recipe.plan[0].step_tokens
    assert stage.optimizer.lr <= recipe.optimizer.lr


@pytest.mark.parametrize("name", DENSE)
def test_a_real_run_is_of_the_published_shape_at_the_first_base(name: str) -> None:
    model = pretraining(name).model
    assert model is not None
    assert (model.rope_theta, model.max_position_embeddings) == (10_000, 4096)
    after = {"rope_theta": 1e6, "max_position_embeddings": 131_072}
    assert model.model_copy(update=after) == PUBLISHED[name]


def test_the_mixture_goes_on_from_the_upcycled_7b() -> None:
    recipe = pretraining("57b-a14b")
    assert recipe.model is None
    assert recipe.init == "out/57b-a14b-upcycled"


@pytest.mark.parametrize("name", TABLE_1)
def test_a_real_runs_model_builds_and_computes_on_the_meta_device(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is allocated: the shapes of all parameters and of the logits of five tokens."""
    config = pretraining(name).model or PUBLISHED[name]  # an upcycled model has the latter's shape
    if config.moe and find_spec("qwen2.model.moe") is None:
        pytest.skip("model/moe.py is not there yet: the decoder builds dense layers only")
    with torch.device("meta"):
        model = Qwen2(config)
        tokens, positions = torch.zeros(5, dtype=torch.long), torch.arange(5)
    _, parameters, without_embeddings = TABLE_1[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert config.num_parameters() == parameters
    assert config.num_non_embedding_parameters() == without_embeddings

    # How many tokens an expert has cannot be counted without data: let the first one have all.
    def counted(ids: torch.Tensor, minlength: int) -> torch.Tensor:
        return torch.tensor([ids.numel(), *[0] * (minlength - 1)])

    monkeypatch.setattr(torch, "bincount", counted)
    with torch.no_grad():
        logits = model(tokens, positions, PackedAttention([2, 3]))
    assert logits.shape == (5, config.vocab_size)


def test_the_miniature_goes_through_both_stages() -> None:
    short, long = pretraining("miniature"), find_recipe("long_context_miniature")
    stage = LongContextRecipe.load(long)
    assert short.model is not None
    assert stage.init == str(short.out / "model")
    assert (short.context, short.model.trained_length, stage.context) == (512, 512, 4096)
    assert (short.model.rope_theta, stage.rope_theta) == (10_000, 1_000_000)
    end = short.optimizer.lr * short.schedule.floor
    assert stage.optimizer.lr == pytest.approx(end), "it goes on where pre-training ended"
    assert (stage.data, stage.tokenizer) == (short.data, short.tokenizer)
