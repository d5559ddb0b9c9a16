"""Closed forms against Table 1 and against the built module."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen2.common.errors import UserError
from qwen2.model.config import PUBLISHED, DualChunk, Mixture, ModelConfig, SlidingWindow, Yarn
from qwen2.model.decoder import Qwen2
from qwen2.model.hf_config import config_from_hf, config_to_hf

TABLE_1 = {  # parameters, without embeddings, bytes of KV cache per token in bf16
    "0.5b": (494_032_768, 357_898_112, 12_288),
    "1.5b": (1_543_714_304, 1_310_340_608, 28_672),
    "7b": (7_615_616_512, 6_525_621_760, 57_344),
    "57b-a14b": (57_408_658_944, 56_319_581_696, 57_344),
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
    assert config.kv_bytes_per_token("fp32") == 2 * config.kv_bytes_per_token("bf16")


def test_active_parameters() -> None:
    for name, config in PUBLISHED.items():
        if name != "57b-a14b":
            assert config.num_active_parameters() == config.num_parameters()
    mixture = PUBLISHED["57b-a14b"]
    assert mixture.num_active_parameters() == 14_249_270_784
    embeddings = mixture.num_parameters() - mixture.num_non_embedding_parameters()
    assert mixture.num_active_parameters() - embeddings == 13_160_193_536


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


MIXTURE = {
    "model_type": "qwen2_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 48,
}
EXTRAS: dict[str, dict[str, Any]] = {
    "dense": {},
    "mixture": {"moe": Mixture(**{k: v for k, v in MIXTURE.items() if k != "model_type"})},
    "yarn": {"yarn": Yarn(factor=4, original_max_position_embeddings=128)},
    "dual chunk": {"dual_chunk": DualChunk(chunk_size=64, local_size=8)},
    "sliding": {"sliding": SlidingWindow(size=16, layers=(1, 2))},
    "sliding, some": {"sliding": SlidingWindow(size=16, layers=(0, 2))},
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_published_names_survive_a_round_trip(tiny: ModelConfig, extra: str) -> None:
    config = tiny.model_copy(update=EXTRAS[extra])
    values = json.loads(json.dumps(config_to_hf(config, "bfloat16")))
    assert config_from_hf(values) == config


@pytest.mark.parametrize("kind", ["type", "rope_type"])
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_yarn(tiny: ModelConfig, key: str, kind: str) -> None:
    values = config_to_hf(tiny, "bfloat16")
    values[key] = {kind: "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    config = config_from_hf(values)
    assert config.yarn == Yarn(factor=4, original_max_position_embeddings=128)
    assert config.trained_length == 128
    assert config.context_length == 512
    del values[key]["original_max_position_embeddings"]
    config = config_from_hf(values)
    assert config.yarn is not None
    assert config.yarn.original_max_position_embeddings == tiny.max_position_embeddings
    assert config.context_length == 4 * tiny.max_position_embeddings


def test_layers_from_max_window_layers_on_slide(tiny: ModelConfig) -> None:
    values = config_to_hf(tiny, "bfloat16")
    values |= {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    config = config_from_hf(values)
    assert [config.window(layer) for layer in range(3)] == [None, 9, 9]
    assert config_from_hf({**values, "use_sliding_window": False}) == tiny


def test_ways_to_a_longer_context_exclude_each_other(tiny: ModelConfig) -> None:
    parts = {name: EXTRAS[name] for name in ("yarn", "dual chunk", "sliding")}
    for other in ("yarn", "sliding"):
        with pytest.raises(UserError, match="dual_chunk"):
            ModelConfig.parse(tiny.model_dump() | parts["dual chunk"] | parts[other])


def test_the_trained_length_of_base_checkpoints_is_not_their_limit() -> None:
    assert PUBLISHED["7b"].max_position_embeddings == 131_072
    assert PUBLISHED["7b"].trained_length == 32_768


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_both_spellings_of_the_rope_base(tiny: ModelConfig, key: str) -> None:
    values = config_to_hf(tiny, "bfloat16")
    del values["rope_theta"]
    values[key] = {"rope_type": "default", "rope_theta": 12_345.0}
    assert config_from_hf(values).rope_theta == 12_345.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "expected 'qwen2'"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling 'linear'"),
        ({"rope_scaling": {"type": "yarn"}}, "key 'factor' is missing"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, "unknown key 'mscale'"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor: .*greater than or equal to 1"),
        ({"use_sliding_window": True, "layer_types": ["linear"]}, "layer_types"),
        ({"use_sliding_window": True, "max_window_layers": "all"}, "max_window_layers 'all'"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window: size"),
        ({"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}}, "local_size must be"),
        ({"model_type": "qwen2_moe"}, "key 'num_experts' is missing"),
        ({**MIXTURE, "mlp_only_layers": [1]}, r"mlp_only_layers \[1\]"),
        ({**MIXTURE, "decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        ({**MIXTURE, "num_experts_per_tok": 9}, "num_experts_per_tok exceeds num_experts"),
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
        config_from_hf({**config_to_hf(tiny, "bfloat16"), **change}, "some/config.json")
    assert str(error.value).startswith("some/config.json: ")
    assert "\n" not in str(error.value)
