"""The native kernels, held to plain PyTorch: as they are compiled, and without vector instructions.

The whole pass is held to the module's own.
"""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.model import native
from qwen2.model.attention import causal_attention
from qwen2.model.cache import KVStore, LayerKV
from qwen2.model.config import DualChunk, ModelConfig, Yarn
from qwen2.model.decode_step import DecodeStep, can_step
from qwen2.model.decoder import Qwen2
from qwen2.model.packing import dequantise_int4, quantise_rows, round_int4
from qwen2.model.quantise import quantise_model
from qwen2.model.quantised_linear import int4_linear, int8_linear

BF16, CPU = torch.bfloat16, torch.device("cpu")
SOURCE = Path(native.__file__).with_name("kernels.cpp")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels compiled without their vector instructions, as other processors run them."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    path = tmp_path_factory.mktemp("plain") / "kernels.so"
    options = ["-std=c++20", "-O1", "-DQWEN2_PLAIN", "-shared", "-fPIC", "-pthread", "-w"]
    subprocess.run([compiler, *options, str(SOURCE), "-o", str(path)], check=True)
    library = ctypes.CDLL(str(path))
    library.needs.restype = ctypes.c_char_p
    return library


@pytest.fixture(params=["compiled", "plain"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs with the kernels of this installation and with the plain ones."""
    if request.param == "plain":
        found = request.getfixturevalue("plain")
        assert not found.fast()
        monkeypatch.setattr(native, "_library", lambda: found)
    elif reason := native.why_not():
        pytest.skip(f"native kernels: {reason}")


FORMATS = {
    "bf16": (lambda w: (w.bfloat16(),), lambda x, w, bias: F.linear(x, w.float(), bias)),
    "int8": (quantise_rows, int8_linear),
    "int4": (round_int4, int4_linear),
}


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 9])
def test_products_are_those_of_pytorch(
    library: None, generator: torch.Generator, format_: str, rows: int
) -> None:
    parts_of, reference = FORMATS[format_]
    for N, K in ((4, 64), (12, 192), (36, 896)):
        x, w = (torch.randn(n, K, generator=generator) for n in (rows, N))
        x, bias = x.bfloat16().float(), torch.randn(N, generator=generator)
        parts = parts_of(w)
        ours = native.product(x, native.Weight(*parts, bias=bias))
        expected = reference(x, *parts, bias)
        if format_ == "int8":  # sums of integers have no order
            assert torch.equal(ours, expected)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-4)


def test_a_product_does_not_depend_on_the_rows_beside_it(
    library: None, generator: torch.Generator
) -> None:
    for parts_of, _ in FORMATS.values():
        weight = native.Weight(*parts_of(torch.randn(8, 128, generator=generator)))
        x = torch.randn(7, 128, generator=generator)
        alone = torch.cat([native.product(row[None], weight) for row in x])
        assert torch.equal(native.product(x, weight), alone)


def test_quantised_rows(library: None, generator: torch.Generator) -> None:
    x = (100 * torch.randn(5, 192, generator=generator)).bfloat16()
    x[2] = 0
    x[3, 7] = 30000
    rows, scale = native.quantise(x)
    expected = quantise_rows(x)
    assert torch.equal(rows, expected[0])
    assert torch.equal(scale, expected[1])


def test_scaled_products(library: None, generator: torch.Generator) -> None:
    sums = torch.randint(-(10**6), 10**6, (3, 20), dtype=torch.int32, generator=generator)
    xs, ws, bias = (torch.rand(n, generator=generator) for n in (3, 20, 20))
    for some in (bias, None):
        out = torch.empty(3, 20, dtype=BF16)
        native.scale_products(sums, xs, ws, some, out)
        expected = sums.float() * xs[:, None] * ws + (0 if some is None else some)
        assert torch.equal(out, expected.bfloat16())


def test_swiglu(library: None, generator: torch.Generator) -> None:
    x = (20 * torch.randn(3, 2 * 40, generator=generator)).bfloat16()
    x[0, 0], x[0, 1] = 300, -300
    gate, up = x.float().chunk(2, dim=-1)
    torch.testing.assert_close(native.swiglu(x), (F.silu(gate) * up).bfloat16(), rtol=8e-3, atol=0)


def test_dequantised_int4(library: None, generator: torch.Generator) -> None:
    parts = round_int4(torch.randn(5, 128, generator=generator))
    assert torch.equal(native.dequantise_int4(*parts), dequantise_int4(*parts).bfloat16())


@settings(max_examples=25)
@given(
    length=st.integers(1, 200), new=st.integers(1, 200), seed=st.integers(0, 9),
    sizes=st.sampled_from([(2, 1, 32), (6, 2, 64), (4, 4, 128), (7, 1, 96)]),
)  # fmt: skip
def test_attention_over_slots(
    length: int, new: int, sizes: tuple[int, int, int], seed: int
) -> None:
    if not native.is_fast():
        pytest.skip(f"native attention: {native.why_not()}")
    check_attention(length, min(new, length), *sizes, seed)


@pytest.mark.parametrize(("length", "new"), [(1, 1), (64, 64), (130, 3), (65, 40)])
def test_plain_attention_over_slots(
    plain: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, length: int, new: int
) -> None:
    monkeypatch.setattr(native, "_library", lambda: plain)
    check_attention(length, new, 6, 2, 64, 0)


def check_attention(length: int, new: int, H: int, K: int, D: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 256, K, D, generator=generator).bfloat16()
    slots = torch.randperm(256, generator=generator)[:length]
    q = (2 * torch.randn(new, H, D, generator=generator)).bfloat16()
    ours = native.attention(q, LayerKV(keys, values), slots)
    expected = causal_attention(q.float(), keys[slots].float(), values[slots].float())
    torch.testing.assert_close(ours.float(), expected, rtol=0.02, atol=0.02)


# -------------------------------------------------------------------------------- the whole pass


@pytest.fixture(scope="module")
def model(random_model: Callable[..., Qwen2]) -> Qwen2:
    config = ModelConfig(
        vocab_size=320, hidden_size=128, intermediate_size=192, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = random_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    return model.bfloat16().eval()


def test_a_pass_by_several_threads_is_that_of_one(library: None, model: Qwen2) -> None:
    """More products than one thread is given alone."""
    ids = [i % 300 for i in range(32)]
    outs = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            step = stepper(model)
            outs.append(step(ids, list(range(32)), [32], [[3, 1]], list(range(32))))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def stepper(model: Qwen2, tokens: int = 512) -> DecodeStep:
    return DecodeStep(model, KVStore(model.config, tokens, BF16, CPU), 16)


@torch.inference_mode()
def full_pass(model: Qwen2, ids: list[int]) -> torch.Tensor:
    tokens = torch.tensor(ids)
    return model(tokens, torch.arange(len(ids)), model.packed([len(ids)])).float()


@pytest.mark.parametrize("method", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_step_is_the_models_own_pass(
    library: None, model: Qwen2, method: str, tied: bool
) -> None:
    if tied:
        state = model.state_dict()
        model = Qwen2(model.config.model_copy(update={"tie_word_embeddings": True})).bfloat16()
        model.load_state_dict(state | {"lm_head.weight": state["model.embed_tokens.weight"]})
    if method != "bf16":
        model = quantise_model(model, method)
    ids = list(range(5, 45))
    expected = full_pass(model, ids)
    step = stepper(model)
    first = step(ids[:30], list(range(30)), [30], [[7, 2]], [0, 29])
    rest = [step([ids[i]], [i], [1], [[7, 2, 9]], [0]) for i in range(30, 40)]
    ours = torch.cat([first, *rest])
    near = 0.06 if method == "bf16" else 0.15  # of the logits' own size: activations round apart
    error = (ours - expected[[0, *range(29, 40)]]).abs().max() / expected.abs().max()
    assert error < near


def test_a_pass_of_several_sequences_is_that_of_each(library: None, model: Qwen2) -> None:
    prompts = [list(range(3, 20)), [9], list(range(40, 45))]
    together, alone = stepper(model), stepper(model)
    tables = [[4, 1], [0], [8]]
    ids = list(itertools.chain(*prompts))
    positions = [i for prompt in prompts for i in range(len(prompt))]
    out = together(ids, positions, [len(p) for p in prompts], tables, [16, 17, 22])
    for row, prompt, table in zip(out, prompts, tables, strict=True):
        one = alone(prompt, list(range(len(prompt))), [len(prompt)], [table], [len(prompt) - 1])
        assert torch.equal(one[0], row)


def test_sequences_may_share_a_prefix_that_is_new_to_both(library: None, model: Qwen2) -> None:
    prompt = list(range(20, 37))
    step = stepper(model)
    out = step(  # the second begins in the block that the first fills in this very pass
        [*prompt, prompt[16]], [*range(17), 16], [17, 1], [[5, 2], [5, 3]], [16, 17]
    )
    assert torch.equal(out[0], out[1])


def test_yarn_and_positions_beyond_the_first_table(library: None, model: Qwen2) -> None:
    yarn = Yarn(factor=4, original_max_position_embeddings=64)
    scaled = Qwen2(model.config.model_copy(update={"yarn": yarn})).bfloat16()
    scaled.load_state_dict(model.state_dict())
    ids = [i % 300 for i in range(290)]
    expected = full_pass(scaled, ids)
    step = stepper(scaled)
    out = step(ids, list(range(290)), [290], [list(range(19))], [0, 289])
    assert (out - expected[[0, 289]]).abs().max() / expected.abs().max() < 0.06


def test_what_the_step_cannot_run(model: Qwen2) -> None:
    config = model.config
    if native.why_not() is None:
        assert can_step(config, BF16, CPU) is None
    assert "bf16" in (can_step(config, torch.float32, CPU) or "bf16")
    chunked = config.model_copy(update={"dual_chunk": DualChunk(chunk_size=64, local_size=8)})
    odd = config.model_copy(update={"intermediate_size": 200})
    for other in (chunked, odd):
        assert can_step(other, BF16, CPU) is not None


def test_kernels_of_another_processor_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.why_not():
        pytest.skip(f"native kernels: {native.why_not()}")
    monkeypatch.setattr(native, "_library", native._library.__wrapped__)
    monkeypatch.setattr(native, "_processor_flags", lambda: {"sse2"})
    assert "another processor" in (native.why_not() or "")
    assert not native.is_fast()


@pytest.mark.parametrize("method", ["bf16", "int8"])
def test_logits_of_hidden_states(
    library: None, model: Qwen2, generator: torch.Generator, method: str
) -> None:
    if method != "bf16":
        model = quantise_model(model, method)
    hidden = torch.randn(3, 128, generator=generator).bfloat16()
    expected = model.lm_head(hidden).float()
    torch.testing.assert_close(stepper(model).logits(hidden), expected, rtol=0.01, atol=0.05)
