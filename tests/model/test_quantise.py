"""Weights in 8 and 4 bits: packing, products, modules, files."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwen2.common.errors import UserError
from qwen2.model.config import Mixture, ModelConfig, Quantisation
from qwen2.model.decoder import Qwen2
from qwen2.model.extend import extended
from qwen2.model.hub import load, load_model, save
from qwen2.model.packing import (
    dequantise_int4,
    dequantise_int8,
    pack_int4,
    quantise_rows,
    round_int4,
    unpack_int4,
)
from qwen2.model.quantise import quantise_model
from qwen2.model.quantised_linear import (
    QuantisedEmbedding,
    QuantisedLinear,
    format_of,
    int4_linear,
    int8_linear,
)
from qwen2.tokenizer import Tokenizer

METHODS = ["int8", "int4"]


@pytest.fixture
def shape(tiny: ModelConfig) -> ModelConfig:
    """Rows that int4 fills, and a feed-forward width (112) that it does not."""
    return tiny


@pytest.fixture
def routed(tiny: ModelConfig) -> ModelConfig:
    """A mixture whose widths int4 fills."""
    moe = Mixture(
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
    )
    return tiny.model_copy(update={"moe": moe})


def logits(model: Qwen2, count: int = 20) -> Tensor:
    tokens = torch.arange(count) * 7 % model.config.vocab_size
    with torch.no_grad():
        return model(tokens, torch.arange(count), model.packed([count]))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Numbers and bytes


def test_int8_rows_by_hand() -> None:
    """Row 0 has the scale 1/2; 63.25 / 0.5 = 126.5 and 0.25 / 0.5 = 0.5 go to the even."""
    x = torch.tensor([[-63.5, 63.25, 0.25, 0.75, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    numbers, scale = quantise_rows(x)
    assert numbers.dtype == torch.int8
    assert numbers.tolist() == [[-127, 126, 0, 2, 0], [0, 0, 0, 0, 0]]
    assert scale.tolist() == pytest.approx([0.5, 0.0])


def test_int8_product_by_hand() -> None:
    """x8 = [127, 64], its scale 1/127; sums 127·10 - 64·20 = -10 and 127·3 = 381."""
    x = torch.tensor([[1.0, 64 / 127]])
    weight = torch.tensor([[10, -20], [3, 0]], dtype=torch.int8)
    y = int8_linear(x, weight, torch.tensor([2.0, 0.5]), torch.tensor([1.0, -1.0]))
    assert y[0].tolist() == pytest.approx([-20 / 127 + 1, 1.5 - 1])


def test_int4_bytes_by_hand() -> None:
    """Of 64 numbers, number i is the low nibble of byte i, number 32 + i its high one."""
    numbers = torch.zeros(1, 128, dtype=torch.uint8)
    numbers[0, 0], numbers[0, 31], numbers[0, 32], numbers[0, 63] = 1, 2, 3, 4
    numbers[0, 64], numbers[0, 127] = 5, 15
    packed = pack_int4(numbers)
    assert packed.shape == (1, 64)
    assert {i: int(b) for i, b in enumerate(packed[0]) if b} == {
        0: 0x31,
        31: 0x42,
        32: 0x05,
        63: 0xF0,
    }


def test_int4_numbers_by_hand() -> None:
    packed = torch.zeros(1, 32, dtype=torch.uint8)
    packed[0, 0] = 0xF2
    scale = torch.tensor([[0.5, 2.0]], dtype=torch.float16)
    minimum = torch.tensor([[-1.0, 3.0]], dtype=torch.float16)
    weight = dequantise_int4(packed, scale, minimum)[0]
    assert weight[0] == 2 * 0.5 - 1
    assert weight[32] == 15 * 2 + 3
    assert (weight[1:32] == -1).all()
    assert (weight[33:] == 3).all()


@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=30)
def test_packing_is_reversible(rows: int, chunks: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 16, (rows, 64 * chunks), generator=generator).to(torch.uint8)
    assert torch.equal(unpack_int4(pack_int4(numbers)), numbers)


@given(st.integers(0, 2**31), st.floats(-6, 2), st.floats(-2, 2))
@settings(max_examples=50)
def test_rounding_is_within_half_a_step(seed: int, exponent: float, shift: float) -> None:
    """A step of int8 is scale; one of int4 is scale too, but the ends are rounded to fp16."""
    weight = normal(3, 128, seed=seed) * 10**exponent + shift * 10**exponent
    numbers, scale = quantise_rows(weight)
    bound = 0.5001 * scale[:, None]
    assert ((weight - dequantise_int8(numbers, scale)).abs() <= bound).all()
    packed, steps, minimum = round_int4(weight)
    wide = steps.float().repeat_interleave(32, -1)
    ends = weight.abs().amax() * 2**-10 + 2**-23  # fp16's steps, and its least numbers
    error = (weight - dequantise_int4(packed, steps, minimum)).abs()
    assert (error <= 0.5001 * wide + 16 * ends).all()


def test_a_group_of_equal_numbers_is_exact() -> None:
    weight = torch.full((2, 64), 0.375)
    weight[1] = 0
    assert torch.equal(dequantise_int4(*round_int4(weight)), weight)


# Products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_products_equal_those_of_dequantised_operands(method: str, dtype: torch.dtype) -> None:
    x, bias = normal(9, 192).to(dtype), normal(40, seed=1).to(dtype)
    form = format_of(Quantisation(method=method), 192)
    parts = form.quantise(normal(40, 192, seed=2))
    rows = dequantise_int8(*quantise_rows(x))
    expected = (rows @ form.dequantise(*parts).t() + bias).to(dtype)
    close = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 0.01}
    torch.testing.assert_close(form.linear(x, *parts, bias), expected, **close)


def test_int8_does_not_depend_on_the_batch() -> None:
    """Bit for bit: the sums are of integers."""
    x, (weight, scale) = normal(70, 896).bfloat16(), quantise_rows(normal(130, 896, seed=1))
    together = int8_linear(x, weight, scale, None)
    for size in (1, 2, 7, 33):
        apart = torch.cat([int8_linear(part, weight, scale, None) for part in x.split(size)])
        assert torch.equal(apart, together)


def test_the_largest_sums_do_not_overflow() -> None:
    """K of the 72B's down projection, all products 127·127."""
    x = torch.ones(1, 29568)
    weight = torch.full((8, 29568), 127, dtype=torch.int8)
    y = int8_linear(x, weight, torch.ones(8), None)
    assert y[0].tolist() == pytest.approx([29568 * 127] * 8)


def test_int4_takes_rows_of_whole_chunks_only() -> None:
    assert format_of(Quantisation(method="int4"), 128).name == "int4"
    assert format_of(Quantisation(method="int4"), 96).name == "int8"
    assert format_of(Quantisation(method="int8"), 128).name == "int8"


# Models


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["shape", "routed"])
@pytest.mark.parametrize("method", METHODS)
def test_a_quantised_model_is_near_its_original(
    method: str,
    kind: str,
    tied: bool,
    random_model: Callable[..., Qwen2],
    request: pytest.FixtureRequest,
) -> None:
    config = request.getfixturevalue(kind).model_copy(update={"tie_word_embeddings": tied})
    model = random_model(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantised = quantise_model(model, method)
    true, found = logits(model), logits(quantised)
    assert (found - true).norm() < {"int8": 0.03, "int4": 0.15}[method] * true.norm()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)  # the original stays
    assert quantised.config.num_parameters() == model.config.num_parameters()
    assert (quantised.lm_head.weight is quantised.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("method", METHODS)
def test_what_is_quantised(method: str, routed: ModelConfig, random_model: Callable) -> None:
    state = quantise_model(random_model(routed, torch.bfloat16), method).state_dict()
    types = {name: tensor.dtype for name, tensor in state.items()}
    numbers = {"int8": torch.int8, "int4": torch.uint8}[method]
    layer = "model.layers.0."
    assert types["model.embed_tokens.weight"] == types["lm_head.weight"] == torch.int8
    assert types[layer + "self_attn.q_proj.weight"] == numbers
    assert types[layer + "self_attn.q_proj.bias"] == torch.bfloat16
    assert types[layer + "mlp.gate.weight"] == torch.bfloat16
    assert types[layer + "mlp.shared_expert_gate.weight"] == torch.bfloat16
    assert types[layer + "mlp.experts.gate_up_proj"] == numbers
    shapes = {
        n.removeprefix(layer + "mlp.experts."): tuple(t.shape)
        for n, t in state.items()
        if n.startswith(layer + "mlp.experts.")
    }
    assert (
        shapes
        == {
            "int8": {
                "gate_up_proj": (6, 128, 64),
                "gate_up_proj_scale": (6, 128),
                "down_proj": (6, 64, 64),
                "down_proj_scale": (6, 64),
            },
            "int4": {
                "gate_up_proj": (6, 128, 32),
                "gate_up_proj_scale": (6, 128, 2),
                "gate_up_proj_min": (6, 128, 2),
                "down_proj": (6, 64, 32),
                "down_proj_scale": (6, 64, 2),
                "down_proj_min": (6, 64, 2),
            },
        }[method]
    )


def test_rows_of_no_whole_chunks_stay_in_int8(shape: ModelConfig, random_model: Callable) -> None:
    layer = quantise_model(random_model(shape), "int4").model.layers[0].mlp
    assert layer.gate_proj.weight.dtype == torch.uint8  # rows of 64
    assert layer.down_proj.weight.dtype == torch.int8  # rows of 112


@pytest.mark.parametrize("method", METHODS)
def test_joined_projections_change_no_bit(
    method: str, shape: ModelConfig, random_model: Callable
) -> None:
    model = quantise_model(random_model(shape), method)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = normal(5, shape.hidden_size)
    layer = model.model.layers[1]
    with torch.no_grad():
        before = [layer.mlp.projections(x), layer.self_attn.projections(x)]
        model.fuse_projections()
        assert layer.mlp.projections.fused
        assert layer.self_attn.projections.fused
        after = [layer.mlp.projections(x), layer.self_attn.projections(x)]
    for some, others in zip(before, after, strict=True):
        for one, other in zip(some, others, strict=True):
            if method == "int8":
                assert torch.equal(one, other)
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
    now = model.state_dict()
    assert all(torch.equal(now[name], state[name]) for name in state)


@pytest.mark.parametrize("method", METHODS)
def test_each_expert_computes_its_tokens(
    method: str, routed: ModelConfig, random_model: Callable
) -> None:
    """Against the plain experts with dequantised weights and activations."""
    model = quantise_model(random_model(routed), method)
    experts = model.model.layers[0].mlp.experts
    x, weights = normal(10, routed.hidden_size), normal(10, 2, seed=1).abs()
    ids = torch.arange(20).view(10, 2) % 4  # two experts see nothing
    gate_up, down = (
        experts.formats[name].dequantise(*experts.parts_of(name))
        for name in ("gate_up_proj", "down_proj")
    )
    expected = torch.zeros_like(x)
    for token in range(10):
        for place, expert in enumerate(ids[token].tolist()):
            row = dequantise_int8(*quantise_rows(x[token : token + 1]))
            gate, up = (row @ gate_up[expert].t()).chunk(2, dim=-1)
            inner = torch.nn.functional.silu(gate) * up
            inner = dequantise_int8(*quantise_rows(inner))
            expected[token] += (inner @ down[expert].t())[0] * weights[token, place]
    torch.testing.assert_close(experts(x, ids, weights), expected, atol=0.05, rtol=0.01)


def test_the_context_of_a_quantised_model_extends(
    shape: ModelConfig, random_model: Callable
) -> None:
    model = quantise_model(random_model(shape), "int8")
    assert torch.equal(logits(extended(model, 2048)), logits(model))


def test_methods_and_models_that_cannot_be(shape: ModelConfig, random_model: Callable) -> None:
    model = random_model(shape)
    with pytest.raises(UserError, match=r"int8.*int4"):
        quantise_model(model, "int5")
    with pytest.raises(UserError, match="is in int8 already"):
        quantise_model(quantise_model(model, "int8"), "int4")


# Files


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["shape", "routed"])
@pytest.mark.parametrize("method", METHODS)
def test_saved_and_loaded_is_the_same_model(
    method: str,
    kind: str,
    tied: bool,
    tmp_path: Path,
    random_model: Callable[..., Qwen2],
    tokenizer: Tokenizer,
    request: pytest.FixtureRequest,
) -> None:
    config = request.getfixturevalue(kind).model_copy(update={"tie_word_embeddings": tied})
    model = quantise_model(random_model(config, torch.bfloat16), method)
    save(model, tokenizer, tmp_path / "saved")
    true, expected = model.state_dict(), logits(model)
    for inference in (False, True):
        loaded, _ = load(tmp_path / "saved", inference=inference)
        assert loaded.config.quantisation == Quantisation(method=method)
        assert loaded.dtype == torch.bfloat16
        state = loaded.state_dict()
        assert list(state) == list(true)
        assert all(torch.equal(state[name], true[name]) for name in true)
        assert all(state[name].dtype == true[name].dtype for name in true)
        assert torch.equal(logits(loaded), expected)
        place = loaded.model.layers[0].self_attn.q_proj.weight.data_ptr()
        loaded.fuse_projections()
        moved = loaded.model.layers[0].self_attn.q_proj.weight.data_ptr() != place
        assert moved is not inference
    names = set(load_file(tmp_path / "saved" / "model.safetensors"))
    assert not tied or not any(name.startswith("lm_head") for name in names)


@pytest.mark.parametrize("kind", ["shape", "routed"])
@pytest.mark.parametrize("method", METHODS)
def test_quantised_while_it_is_read(
    method: str,
    kind: str,
    tmp_path: Path,
    random_model: Callable[..., Qwen2],
    tokenizer: Tokenizer,
    request: pytest.FixtureRequest,
) -> None:
    """From single matrices in several files; as quantising the loaded model."""
    model = random_model(request.getfixturevalue(kind))
    save(model, tokenizer, tmp_path / "plain", max_shard_bytes=100_000)
    read, _ = load(tmp_path / "plain", quantize=method)
    true = quantise_model(model, method).state_dict()
    state = read.state_dict()
    assert list(state) == list(true)
    assert all(torch.equal(state[name], true[name]) for name in true)


def test_nothing_but_what_it_needs_is_imported() -> None:
    """Arrow alone would be 40 MB; who rounds without a text needs nothing of the corpus."""
    code = (
        "import sys, qwen2.inference, qwen2.model.quantise; "
        "print({'pyarrow', 'sympy', 'torch._dynamo', 'qwen2.corpus'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_a_quantised_folder_asked_for_in_its_own_method(
    tmp_path: Path, shape: ModelConfig, random_model: Callable, tokenizer: Tokenizer
) -> None:
    save(quantise_model(random_model(shape), "int8"), tokenizer, tmp_path / "saved")
    assert load(tmp_path / "saved", quantize="int8")[0].config.quantisation
    with pytest.raises(UserError, match="saved: is in int8 already"):
        load(tmp_path / "saved", quantize="int4")


def test_the_configuration_says_how(
    tmp_path: Path, shape: ModelConfig, random_model: Callable, tokenizer: Tokenizer
) -> None:
    expected = {
        "int8": {"quant_method": "qwen2-int8"},
        "int4": {"quant_method": "qwen2-int4", "group_size": 32},
    }
    for method in METHODS:
        save(quantise_model(random_model(shape), method), tokenizer, tmp_path / method)
        values = json.loads((tmp_path / method / "config.json").read_text())
        assert values["quantization_config"] == expected[method]


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "bitsandbytes"])
def test_what_others_have_quantised_is_refused(
    method: str, tmp_path: Path, shape: ModelConfig, random_model: Callable, tokenizer: Tokenizer
) -> None:
    save(random_model(shape), tokenizer, tmp_path / "saved")
    _change_config(tmp_path / "saved", {"quant_method": method, "bits": 4, "group_size": 128})
    with pytest.raises(UserError, match=f"quantised by '{method}'.*not readable") as error:
        load_model(tmp_path / "saved")
    assert "\n" not in str(error.value)


def test_another_group_size_is_refused(
    tmp_path: Path, shape: ModelConfig, random_model: Callable, tokenizer: Tokenizer
) -> None:
    save(quantise_model(random_model(shape), "int4"), tokenizer, tmp_path / "saved")
    _change_config(tmp_path / "saved", {"quant_method": "qwen2-int4", "group_size": 64})
    with pytest.raises(UserError, match="'group_size': 64"):
        load_model(tmp_path / "saved")


def _change_config(folder: Path, quantised: dict[str, object]) -> None:
    path = folder / "config.json"
    values = json.loads(path.read_text()) | {"quantization_config": quantised}
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("model.layers.0.self_attn.q_proj.weight", torch.uint8),
        ("model.layers.0.self_attn.q_proj.weight_scale", torch.bfloat16),
        ("model.norm.weight", torch.int8),
    ],
)
def test_a_tensor_of_the_wrong_type_is_named(
    name: str,
    dtype: torch.dtype,
    tmp_path: Path,
    shape: ModelConfig,
    random_model: Callable,
    tokenizer: Tokenizer,
) -> None:
    save(quantise_model(random_model(shape), "int8"), tokenizer, tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, path)
    with pytest.raises(UserError, match=f"tensor '{name}' is of type {dtype}, expected"):
        load_model(tmp_path / "saved")


def test_integers_without_a_method_are_refused(
    tmp_path: Path, shape: ModelConfig, random_model: Callable, tokenizer: Tokenizer
) -> None:
    save(random_model(shape), tokenizer, tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)
    save_file(tensors, path)
    with pytest.raises(UserError, match="expected numbers that are not quantised"):
        load_model(tmp_path / "saved")


def test_modules_name_their_parts() -> None:
    layer = QuantisedLinear(64, 8, True, format_of(Quantisation(method="int4"), 64))
    assert list(layer.parts()) == ["weight", "weight_scale", "weight_min", "bias"]
    assert [name for name, _ in QuantisedEmbedding(4, 8).named_parameters()] == [
        "weight",
        "weight_scale",
    ]
    with torch.no_grad():
        for part, value in zip(layer.parts_of("weight"), round_int4(normal(8, 64)), strict=True):
            part.copy_(value)
        layer.bias.zero_()
        x = normal(3, 64, seed=1)
        assert torch.equal(layer(x), int4_linear(x, *layer.parts_of("weight"), layer.bias))


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_what_is_computed_as_one_lies_so_from_the_start(
    method: str, tiny: ModelConfig, random_model: Callable[..., Qwen2]
) -> None:
    """Fusing later would copy, and leave holes as large as the weights."""
    model = quantise_model(random_model(tiny), method)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    model.fuse_projections()
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == before
    assert all(m.fused for m in (layer.mlp.projections for layer in model.model.layers))
