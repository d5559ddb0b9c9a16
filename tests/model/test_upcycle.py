"""Upcycling: the report's procedure, the identity it keeps, and the folder that comes of it."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from qwen2.common.errors import UserError
from qwen2.common.files import verify_folder
from qwen2.model import hf_folder
from qwen2.model.attention import PackedAttention
from qwen2.model.config import PUBLISHED, Mixture, ModelConfig
from qwen2.model.decoder import Qwen2
from qwen2.model.hub import Checkpoint, load, load_config, load_model, open_checkpoint, save
from qwen2.model.upcycle import (
    PROJECTIONS,
    UpcycleConfig,
    UpcycledTensors,
    count_copies,
    default_expert_size,
    routed_order,
    shared_order,
    units_at,
    upcycle,
)
from qwen2.tokenizer import Tokenizer

Maker = Callable[..., Qwen2]
FFN = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class InMemory:
    """A stored tensor that is not in a file."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def mapped(self) -> torch.Tensor:
        raise AssertionError("upcycling reads copies")

    def read_rows(self, start: int, out: torch.Tensor) -> None:
        out.copy_(self.tensor[start : start + len(out)])


def shape(dense_size: int, hidden: int = 4, layers: int = 1) -> ModelConfig:
    return ModelConfig(
        vocab_size=5,
        hidden_size=hidden,
        intermediate_size=dense_size,
        num_hidden_layers=layers,
        num_attention_heads=1,
        num_key_value_heads=1,
    )


def checkpoint(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Checkpoint:
    """A dense model whose every number is another."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Qwen2(config).named_parameters()}
    random = torch.Generator().manual_seed(1)
    tensors = {
        name: InMemory(torch.randn(shape, dtype=torch.float64, generator=random).to(dtype))
        for name, shape in shapes.items()
    }
    return Checkpoint(Path("dense"), config, tensors, dtype, lambda: pytest.fail("no tokenizer"))


def made(
    dense_size: int, *, hidden: int = 4, layers: int = 1, **options: Any
) -> tuple[Checkpoint, UpcycledTensors]:
    dense = checkpoint(shape(dense_size, hidden, layers))
    return dense, UpcycledTensors(dense, UpcycleConfig(**options), torch.float64)


def ffn(tensors: Any, place: str) -> FFN:
    gate, up, down = (tensors[f"{place}.{name}.weight"] for name in PROJECTIONS)
    return gate, up, down


def dense_ffn(dense: Checkpoint, layer: int = 0) -> FFN:
    values = {name: stored.tensor for name, stored in dense.tensors.items()}  # type: ignore[attr-defined]
    return ffn(values, f"model.layers.{layer}.mlp")


def expert(tensors: UpcycledTensors, index: int, layer: int = 0) -> FFN:
    return ffn(tensors, f"model.layers.{layer}.mlp.experts.{index}")


def shared_expert(tensors: UpcycledTensors, layer: int = 0) -> FFN:
    return ffn(tensors, f"model.layers.{layer}.mlp.shared_expert")


def apply(weights: FFN, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = weights
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def units_of(weights: FFN, dense: FFN) -> list[int | None]:
    """The dense unit that each unit is, gate row, up row and down column together; None: none."""
    known = {rows: i for i, rows in enumerate(unit_rows(dense))}
    return [known.get(rows) for rows in unit_rows(weights)]


def unit_rows(weights: FFN) -> list[tuple[float, ...]]:
    gate, up, down = weights
    return [tuple(row) for row in torch.cat([gate, up, down.T], dim=1).tolist()]


# --- the report's numbers -------------------------------------------------------------------------


def test_57b_from_7b() -> None:
    dense = PUBLISHED["7b"]
    moe = UpcycleConfig().mixture(dense)
    assert moe == PUBLISHED["57b-a14b"].moe
    copies, discarded = count_copies(moe, dense.intermediate_size)
    assert (copies, copies * dense.intermediate_size, discarded) == (9, 170_496, 6_656)


def test_57b_experts_straddle_copies() -> None:
    options, width = UpcycleConfig(seed=3), 18_944
    order = routed_order(options, 27, width)
    # Expert 7 has [17920, 20480): the last 1,024 of the first copy and 1,536 of the second.
    expert = units_at(17_920, 20_480, width, order)
    assert np.array_equal(expert, np.concatenate([order(0)[-1024:], order(1)[:1536]]))
    last = units_at(161_280, 163_840, width, order)
    assert np.array_equal(last, order(8)[161_280 - 8 * width : 163_840 - 8 * width])
    assert len(units_at(163_840, 170_496, width, order)) == 6_656


@pytest.mark.parametrize(
    ("dense_size", "expected"), [(18_944, 2560), (4864, 656), (29_568, 4000), (112, 16), (1, 16)]
)
def test_the_default_width_of_an_expert(dense_size: int, expected: int) -> None:
    assert default_expert_size(dense_size) == expected


# --- the procedure --------------------------------------------------------------------------------

widths = st.tuples(st.integers(1, 12), st.integers(1, 6), st.integers(1, 12), st.integers(0, 9))


@settings(max_examples=60)
@given(widths)
def test_cuts_of_shuffled_copies(sizes: tuple[int, int, int, int]) -> None:
    size, experts, dense_size, seed = sizes
    dense, tensors = made(
        dense_size, experts=experts, experts_per_token=1, expert_size=size, seed=seed, reinit=0
    )
    copies, discarded = count_copies(tensors.moe, dense_size)
    assert 0 <= discarded < dense_size
    assert (copies - 1) * dense_size < experts * size
    order = routed_order(tensors.options, 0, dense_size)
    for copy in range(copies):
        assert sorted(order(copy)) == list(range(dense_size))
    line = [int(unit) for copy in range(copies) for unit in order(copy)]
    found = [units_of(expert(tensors, e), dense_ffn(dense)) for e in range(experts)]
    assert found == [line[e * size : (e + 1) * size] for e in range(experts)]


@settings(max_examples=60)
@given(widths, st.sampled_from([0.25, 0.5, 1.0]))
def test_half_of_the_units_are_new(sizes: tuple[int, int, int, int], share: float) -> None:
    size, experts, dense_size, seed = sizes
    options = {"experts": experts, "experts_per_token": 1, "expert_size": size, "seed": seed}
    dense, tensors = made(dense_size, reinit=share, **options)
    _, plain = made(dense_size, reinit=0, **options)
    for e in range(experts):
        before = units_of(expert(plain, e), dense_ffn(dense))
        after = units_of(expert(tensors, e), dense_ffn(dense))
        assert after.count(None) == round(share * size)
        assert all(b in (a, None) for a, b in zip(before, after, strict=True))
        # All of a new unit is new: gate, up and down.
        for old, new, dim in zip(expert(plain, e), expert(tensors, e), (1, 1, 0), strict=True):
            changed = (old != new).all(dim)
            assert torch.equal(changed, torch.tensor([unit is None for unit in after]))
    if round(share * size):
        gates = {tuple(expert(tensors, e)[0].flatten().tolist()) for e in range(experts)}
        assert len(gates) == experts


@pytest.mark.parametrize("sizes", [(8, 6, 12), (5, 7, 12), (20, 3, 12), (3, 2, 12)])
def test_all_experts_and_what_is_left_over_are_the_copies(sizes: tuple[int, int, int]) -> None:
    size, experts, dense_size = sizes
    dense, tensors = made(
        dense_size, experts=experts, experts_per_token=1, expert_size=size, reinit=0
    )
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    copies, discarded = count_copies(tensors.moe, dense_size)
    end = copies * dense_size
    rest = units_at(end - discarded, end, dense_size, routed_order(tensors.options, 0, dense_size))
    gate, up, down = dense_ffn(dense)
    left_over = apply((gate[rest], up[rest], down[:, rest]), x)
    total = sum(apply(expert(tensors, e), x) for e in range(experts))
    expected = apply(dense_ffn(dense), x)
    torch.testing.assert_close(total + left_over, copies * expected, atol=1e-10, rtol=0)
    if not discarded:
        weight = dense_size / (experts * size)
        torch.testing.assert_close(weight * total, expected, atol=1e-10, rtol=0)


def test_copy_cuts_in_order() -> None:
    dense, tensors = made(5, experts=4, experts_per_token=1, expert_size=3, init="copy")
    found = [units_of(expert(tensors, e), dense_ffn(dense)) for e in range(4)]
    assert found == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


@pytest.mark.parametrize("granularity", ["unit", "parameter"])
@pytest.mark.parametrize("std", ["matched", "initializer_range"])
def test_the_share_and_spread_of_new_numbers(granularity: str, std: str) -> None:
    dense = checkpoint(shape(256, hidden=256))
    for i, name in enumerate(PROJECTIONS):  # three spreads to tell apart
        dense.tensors[f"model.layers.0.mlp.{name}.weight"].tensor.mul_(1 + i)  # type: ignore[attr-defined]
    options = UpcycleConfig(
        experts=2, experts_per_token=1, expert_size=384, granularity=granularity, std=std
    )
    tensors = UpcycledTensors(dense, options, torch.float64)
    plain = UpcycledTensors(dense, options.model_copy(update={"reinit": 0.0}), torch.float64)
    masks = []
    for i, (old, new) in enumerate(zip(expert(plain, 1), expert(tensors, 1), strict=True)):
        changed = old != new
        masks.append(changed if i < 2 else changed.T)
        assert int(changed.sum()) == old.numel() // 2
        fresh = new[changed]  # 49,152 numbers
        expected = (1.0 + i) if std == "matched" else 0.02
        assert abs(float(fresh.std()) / expected - 1) < 0.02
        assert abs(float(fresh.mean())) < 0.02 * expected
        assert abs(float(fresh.double().pow(4).mean()) / expected**4 - 3) < 0.15  # normal
    together = torch.equal(masks[0], masks[1]) and torch.equal(masks[0], masks[2])
    assert together == (granularity == "unit")


def test_the_router() -> None:
    _, tensors = made(16, hidden=1024, experts=64, layers=2)
    for layer in range(2):
        weight = tensors[f"model.layers.{layer}.mlp.gate.weight"]
        assert weight.shape == (64, 1024)
        assert abs(float(weight.std()) / 0.02 - 1) < 0.02
    first, second = (tensors[f"model.layers.{layer}.mlp.gate.weight"] for layer in range(2))
    assert not torch.equal(first, second)
    _, zero = made(16, router_std=0.0)
    assert not zero["model.layers.0.mlp.gate.weight"].any()


# --- shared experts -------------------------------------------------------------------------------


@pytest.mark.parametrize("shared_size", [12, 13, 24, 35, 36, 100])
def test_preserve_is_the_dense_ffn(shared_size: int) -> None:
    dense, tensors = made(12, experts=8, expert_size=4, shared_size=shared_size)
    x = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    gate = torch.sigmoid(x @ tensors["model.layers.0.mlp.shared_expert_gate.weight"].T)
    result = gate * apply(shared_expert(tensors), x)
    torch.testing.assert_close(result, apply(dense_ffn(dense), x), atol=1e-12, rtol=0)


def test_preserve_of_too_few_units_doubles_those_there() -> None:
    dense, tensors = made(12, experts=8, expert_size=4, shared_size=5)
    gate, up, down = dense_ffn(dense)
    expected = (gate[:5], up[:5], 2 * down[:, :5])
    assert all(map(torch.equal, shared_expert(tensors), expected))


def test_shared_copies_are_the_first_in_order_then_shuffled() -> None:
    dense, tensors = made(12, experts=8, expert_size=4, shared_size=31, shared="copy")
    found = units_of(shared_expert(tensors), dense_ffn(dense))
    second, third = (shared_order(tensors.options, 0, 12)(copy).tolist() for copy in (1, 2))
    assert found == [*range(12), *second, *third[:7]]
    assert sorted(second) == sorted(third) == list(range(12))
    assert second != third
    assert second != routed_order(tensors.options, 0, 12)(1).tolist()
    baseline = made(12, experts=8, expert_size=4, shared_size=31, shared="copy", init="copy")[1]
    assert all(map(torch.equal, shared_expert(tensors), shared_expert(baseline)))


def test_preserve_counts_how_often_a_unit_occurs() -> None:
    dense, tensors = made(12, experts=8, expert_size=4, shared_size=31)
    units = units_at(0, 31, 12, shared_order(tensors.options, 0, 12)).tolist()
    scales = shared_expert(tensors)[2] / dense_ffn(dense)[2][:, units]
    expected = torch.tensor([2 / Counter(units)[unit] for unit in units], dtype=torch.float64)
    torch.testing.assert_close(scales, expected.expand(4, 31))


def test_random_shared_experts() -> None:
    _, tensors = made(16, hidden=128, expert_size=64, shared="random", layers=2)
    matrices = [matrix for layer in range(2) for matrix in shared_expert(tensors, layer)]
    assert all(abs(float(matrix.std()) / 0.02 - 1) < 0.02 for matrix in matrices)
    assert len({float(matrix[0, 0]) for matrix in matrices}) == 6


# --- every tensor by itself -----------------------------------------------------------------------

SMALL: dict[str, Any] = {"experts": 3, "experts_per_token": 2, "expert_size": 7}


def test_the_order_of_asking_does_not_matter() -> None:
    _, tensors = made(10, layers=2, **SMALL)
    _, again = made(10, layers=2, **SMALL)
    forwards = dict(tensors)
    backwards = {name: again[name] for name in reversed(list(again))}
    assert forwards.keys() == backwards.keys() == tensors.shapes.keys()
    assert all(torch.equal(tensor, backwards[name]) for name, tensor in forwards.items())
    assert all(tuple(t.shape) == tensors.shapes[name] for name, t in forwards.items())


@pytest.mark.parametrize("granularity", ["unit", "parameter"])
def test_seeds_and_layers_differ(granularity: str) -> None:
    options = {**SMALL, "granularity": granularity}
    _, one = made(10, layers=2, seed=1, **options)
    _, other = made(10, layers=2, seed=2, **options)
    drawn = [name for name in one if ".experts." in name or ".mlp.gate." in name]
    assert len(drawn) == 2 * (3 * 3 + 1)
    assert not any(torch.equal(one[name], other[name]) for name in drawn)
    assert (
        routed_order(one.options, 0, 64)(0).tolist() != routed_order(one.options, 1, 64)(0).tolist()
    )
    kept = [name for name in one if name not in drawn]
    assert all(torch.equal(one[n], other[n]) for n in kept if "shared_expert." not in n)


def test_number_types_draw_the_same() -> None:
    dense = checkpoint(shape(40), torch.float32)
    options = UpcycleConfig(**SMALL)
    full, half = (UpcycledTensors(dense, options, d) for d in (torch.float32, torch.bfloat16))
    for name, tensor in full.items():
        torch.testing.assert_close(half[name].float(), tensor, atol=1e-6, rtol=2**-7)


# --- the folder -----------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def source(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    tiny: ModelConfig,
    random_model: Maker,
    tokenizer: Tokenizer,
) -> Path:
    """A dense checkpoint in fp32, in several files."""
    config = tiny.model_copy(update={"tie_word_embeddings": request.param, "eos_token_id": 257})
    save(random_model(config), tokenizer, tmp_path / "dense", max_shard_bytes=100_000)
    return tmp_path / "dense"


def logits(model: Qwen2) -> torch.Tensor:
    tokens = torch.arange(40) * 7 % model.config.vocab_size
    return model(tokens, torch.arange(40), PackedAttention([40]))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", ["auto", "bf16"])
def test_a_folder(
    source: Path, tmp_path: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen2.model.upcycle._SMALL_SHARD", 0)
    options = UpcycleConfig(experts=6, experts_per_token=2)
    config = upcycle(source, tmp_path / "out", options, dtype=dtype)
    assert verify_folder(tmp_path / "out") is None
    assert config.moe == Mixture(
        num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=32,
    )  # fmt: skip
    dense = load_config(source)
    assert load_config(tmp_path / "out") == dense.model_copy(update={"moe": config.moe})
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["model_type"] == "qwen2_moe"
    assert values["norm_topk_prob"] is False
    assert values["router_aux_loss_coef"] == 0.001
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    notes = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert notes["dense"] == str(source)
    assert (notes["seed"], notes["expert_size"], notes["router_std"]) == (0, 16, 0.02)

    number_type = torch.float32 if dtype == "auto" else torch.bfloat16
    tensors = UpcycledTensors(open_checkpoint(source), options, number_type)
    files, before = stored(tmp_path / "out"), stored(source)
    assert files.keys() == tensors.keys()
    assert sum(tensor.numel() for tensor in files.values()) == config.num_parameters()
    for name, tensor in files.items():
        assert tensor.dtype == number_type
        assert torch.equal(tensor, tensors[name])
        if ".mlp." not in name:
            assert torch.equal(tensor, before[name].to(number_type))
    shards = [file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors")]
    assert len(shards) > 3
    largest = max(tensors.layer_bytes(), dense.vocab_size * dense.hidden_size * 4)
    assert max(shards) < largest + 20_000  # and a header


@torch.no_grad()
def test_transformers_runs_it(source: Path, tmp_path: Path) -> None:
    options = UpcycleConfig(experts=6, experts_per_token=2, shared_size=200)
    config = upcycle(source, tmp_path / "out", options)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert isinstance(model, transformers.Qwen2MoeForCausalLM)
    assert not any(info.values()), info
    dense = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.arange(40)[None] * 7 % config.vocab_size
    assert model.eval()(tokens).logits.isfinite().all()
    for layer in model.model.layers:  # without what is routed, the dense model is left
        layer.mlp.experts.down_proj.zero_()
    torch.testing.assert_close(model(tokens).logits, dense(tokens).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_it_loads_here_and_starts_from_the_dense_model(source: Path, tmp_path: Path) -> None:
    options = UpcycleConfig(experts=6, experts_per_token=2, shared_size=200)
    upcycle(source, tmp_path / "out", options)
    dense, (model, _) = load_model(source), load(tmp_path / "out")
    assert model.config.moe == options.mixture(dense.config)
    expected = UpcycledTensors(open_checkpoint(source), options, torch.float32)
    weight = model.model.layers[1].mlp.experts.down_proj[3]  # type: ignore[union-attr, index]
    assert torch.equal(weight, expected["model.layers.1.mlp.experts.3.down_proj.weight"])
    assert not torch.allclose(logits(model), logits(dense), atol=1e-3)
    for name, parameter in model.named_parameters():
        if name.endswith("experts.down_proj"):
            parameter.zero_()
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_saved_again_it_is_the_same(source: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    upcycle(source, tmp_path / "out", UpcycleConfig(**SMALL))
    save(load_model(tmp_path / "out"), tokenizer, tmp_path / "again")
    before, after = stored(tmp_path / "out"), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize("type_", [Type.F32, Type.Q8_0, Type.Q4_0], ids=lambda t: t.name)
def test_a_gguf_source(
    tmp_path: Path,
    wide: ModelConfig,
    write_gguf: Callable[..., None],
    read_gguf: Callable[[Path], dict[str, torch.Tensor]],
    gguf_name: Callable[[str], str],
    type_: Type,
) -> None:
    write_gguf(tmp_path / "dense.gguf", wide, type_)
    options = UpcycleConfig(experts=4, experts_per_token=2, init="copy", shared="copy")
    upcycle(tmp_path / "dense.gguf", tmp_path / "out", options)
    expected, files = read_gguf(tmp_path / "dense.gguf"), stored(tmp_path / "out")
    assert verify_folder(tmp_path / "out") is None
    assert {tensor.dtype for tensor in files.values()} == {torch.bfloat16}
    for name, tensor in files.items():
        if ".mlp." not in name:
            assert torch.equal(tensor, expected[gguf_name(name)].bfloat16())
    size = default_expert_size(wide.intermediate_size)
    gate = expected["blk.0.ffn_gate.weight"].bfloat16()[size : 2 * size]
    down = expected["blk.0.ffn_down.weight"].bfloat16()[:, size : 2 * size]
    assert torch.equal(files["model.layers.0.mlp.experts.1.gate_proj.weight"], gate)
    assert torch.equal(files["model.layers.0.mlp.experts.1.down_proj.weight"], down)


def test_progress_counts_layers(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upcycle(source, tmp_path / "out", UpcycleConfig(**SMALL))
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in err.splitlines()]
    assert out == ""
    assert lines[-1]["stage"] == "upcycle"
    assert lines[-1]["done"] == lines[-1]["total"] == 3


# --- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_a_stop_halfway_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr("qwen2.model.upcycle._SMALL_SHARD", 0)
    save_file = hf_folder.save_file

    def stop(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        if "-00003-" in path.name:
            raise error
        save_file(tensors, path, **options)

    monkeypatch.setattr(hf_folder, "save_file", stop)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        upcycle(source, tmp_path / "out", UpcycleConfig(**SMALL))
    if isinstance(error, OSError):
        assert str(caught.value) == f"{tmp_path / 'out'}: the disk is full; nothing was changed"
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = shutil.which("mount")
    command = [mount or "", "-t", "tmpfs", "-o", "size=1m", "none", str(place)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small tmpfs here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_leaves_nothing(source: Path, little_disk: Path) -> None:
    with pytest.raises(UserError, match=r"out: the disk is full; nothing was changed"):
        upcycle(source, little_disk / "out", UpcycleConfig())
    assert not list(little_disk.iterdir())


def test_an_existing_folder_stays(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: exists already"):
        upcycle(source, tmp_path / "out", UpcycleConfig(**SMALL))
    assert not list((tmp_path / "out").iterdir())


def test_a_mixture_is_no_source(source: Path, tmp_path: Path) -> None:
    upcycle(source, tmp_path / "out", UpcycleConfig(**SMALL))
    with pytest.raises(UserError, match=r"out: has 3 experts already; give a dense model"):
        upcycle(tmp_path / "out", tmp_path / "more", UpcycleConfig(**SMALL))


def test_a_damaged_source_is_named(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    with pytest.raises(UserError, match=r"dense: tensor '.*mlp.gate_proj.weight' has shape"):
        upcycle(source, tmp_path / "out", UpcycleConfig(**SMALL))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 4, "experts_per_token": 5}, "experts_per_token 5 exceeds experts 4"),
        ({"experts": 0}, "experts: "),
        ({"expert_size": 0}, "expert_size: "),
        ({"shared_size": -1}, "shared_size: "),
        ({"reinit": 1.5}, "reinit: "),
        ({"init": "drop"}, "init: "),
        ({"granularity": "row"}, "granularity: "),
        ({"seed": -1}, "seed: "),
        ({"expert_sise": 3}, "did you mean 'expert_size'"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        UpcycleConfig.parse(options, "upcycle")
    assert "\n" not in str(caught.value)
