"""Closed forms against Table 1 and against the built module."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.model.config import PUBLISHED, ModelConfig
from qwen2.model.decoder import Qwen2

TABLE_1 = {  # parameters, without embeddings, bytes of KV cache per token in bf16
    "0.5b": (494_032_768, 357_898_112, 12_288),
    "1.5b": (1_543_714_304, 1_310_340_608, 28_672),
    "7b": (7_615_616_512, 6_525_621_760, 57_344),
    "72b": (72_706_203_648, 70_214_787_072, 327_680),
}


@pytest.mark.parametrize("name", TABLE_1)
def test_closed_forms_equal_the_table(name: str) -> None:
    config = PUBLISHED[name]
    counts = (
        config.num_parameters(),
        config.num_non_embedding_parameters(),
        config.kv_bytes_per_token("bf16"),
    )
    assert counts == TABLE_1[name]
    assert config.num_active_parameters() == config.num_parameters()
    assert config.kv_bytes_per_token("fp32") == 2 * config.kv_bytes_per_token("bf16")


def built_parameters(config: ModelConfig) -> int:
    with torch.device("meta"):
        model = Qwen2(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", TABLE_1)
def test_the_built_module_has_as_many(name: str) -> None:
    assert built_parameters(PUBLISHED[name]) == PUBLISHED[name].num_parameters()


@given(
    heads=st.tuples(st.integers(1, 4), st.integers(1, 3)),
    head_dim=st.integers(1, 8).map(lambda n: 2 * n),
    layers=st.integers(1, 3),
    intermediate=st.integers(1, 40),
    vocabulary=st.integers(1, 50),
    tied=st.booleans(),
)
def test_any_miniature_agrees_with_its_module(
    heads: tuple[int, int], head_dim: int, layers: int, intermediate: int, vocabulary: int,
    tied: bool,
) -> None:  # fmt: skip
    kv_heads, groups = heads
    config = ModelConfig(
        vocab_size=vocabulary,
        hidden_size=kv_heads * groups * head_dim,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * groups,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
    )
    assert built_parameters(config) == config.num_parameters()


def test_flops_per_token_by_hand() -> None:
    config = ModelConfig(
        vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    # q 16+4, k and v 2·(8+2), o 16, mlp 96, norms 3·4 = 164; head 40
    assert config.num_non_embedding_parameters() == 164
    assert config.flops_per_token(100) == 6 * (164 + 40) + 6 * 1 * 4 * 100


def test_published_names_survive_a_round_trip(tiny: ModelConfig) -> None:
    values = json.loads(json.dumps(tiny.to_hf("bfloat16")))
    assert ModelConfig.from_hf(values) == tiny


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_the_rope_base(tiny: ModelConfig, key: str) -> None:
    values = tiny.to_hf("bfloat16")
    del values["rope_theta"]
    values[key] = {"rope_type": "default", "rope_theta": 12_345.0}
    assert ModelConfig.from_hf(values).rope_theta == 12_345.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "expected 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"num_key_value_heads": 3}, "multiple of num_key_value_heads"),
        ({"hidden_size": 66}, "multiple of num_attention_heads"),
        ({"head_dim": 7}, "head_dim 7"),
        ({"vocab_size": "many"}, "vocab_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    tiny: ModelConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        ModelConfig.from_hf({**tiny.to_hf("bfloat16"), **change}, "some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert "\n" not in str(error.value)
