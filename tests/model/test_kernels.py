"""The table of kernels: what is chosen, and that all choices give the same."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen2.model import kernels, native, quantised_linear
from qwen2.model import operation as measured
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.operation import DEVICES, Kernel, Operation

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for operation in kernels.TABLE.values():
        monkeypatch.setattr(operation, "microseconds", {})
        monkeypatch.setattr(operation, "order", {})
        operation.forget()
    return tmp_path / "qwen2" / "kernels.json"


def randomize(operand: Any, generator: torch.Generator) -> None:
    """Fill every tensor of numbers in an operand."""
    if isinstance(operand, Qwen2):
        init_weights(operand, generator)
    elif isinstance(operand, tuple):
        for each in operand:
            randomize(each, generator)
    elif isinstance(operand, torch.Tensor) and operand.is_floating_point():
        wide = operand if operand.stride().count(0) == 0 else operand[:, :1]  # heads share keys
        wide.normal_(0, 0.5, generator=generator)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", kernels.TABLE)
@torch.inference_mode()
def test_every_kernel_gives_the_same(name: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    operation, place = kernels.TABLE[name], torch.device(device)
    operands = operation.operands(place)
    randomize(operands, torch.Generator(place).manual_seed(0))
    results = []
    for kernel in operation.kernels[device].values():
        if kernel.takes(*operands):
            first = operands[0]  # some write over it
            own = first.clone() if isinstance(first, torch.Tensor) else first
            results.append(kernel.run(*kernel.prepare(own, *operands[1:])).float())
    plain = results[-1]
    for other in results[:-1]:  # bf16, and int4 with and without 8-bit activations
        assert (other - plain).abs().max() < 0.03 * plain.abs().max()


def test_the_table_has_what_there_is_to_choose_between() -> None:
    """Each reference is the last; where a kernel is never used, it says why."""
    for operation in kernels.TABLE.values():
        for device in DEVICES:
            assert list(operation.kernels[device])[-1] == operation.plain[0]
            assert operation.order[device]
            for name, kernel in operation.kernels[device].items():
                assert (name in operation.order[device]) == (not kernel.never)
    assert kernels.TABLE["bf16 rows"].kernels["cpu"]["oneDNN, packed"].never
    assert kernels.TABLE["int4 rows"].kernels["cpu"]["int4pack"].never
    assert kernels.TABLE["expert products"].order["cuda"][0] == "grouped_mm"
    assert kernels.TABLE["merged attention"].order["cuda"][0] == "flash"


def test_nothing_is_chosen_elsewhere() -> None:
    """Who asks for the device, or for the native kernels, may be choosing: these are not."""
    asks = re.compile(r"device\.type|is_cuda|is_fast\(\)|why_not\(\)|can_attend\(|can_step\(")
    harmless = {
        "kernels.py",
        "operation.py",
        "native.py",  # what its kernels take
        "decode_step.py",  # the same
        "attend.py",  # the flash kernel's name by device
        "quantised_linear.py",  # padding that `_int_mm` wants on CUDA
    }
    source = Path(kernels.__file__).parents[1]
    for folder in ("model", "inference"):
        for path in (source / folder).glob("*.py"):
            if path.name not in harmless:
                assert not asks.search(path.read_text()), path


def test_the_fastest_is_chosen_and_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(operation: Operation, device: torch.device) -> dict[str, float | None]:
        measured.append(operation)
        return {kernel: 9.0 - i for i, kernel in enumerate(operation.kernels[device.type])}

    monkeypatch.setattr(Operation, "measure", measure)
    kernels.tune()
    for operation in kernels.TABLE.values():
        assert operation.order["cpu"][0] == operation.plain[0]
        assert operation.order["cuda"] == [n for n, k in operation.kernels["cuda"].items()]
    kernels.tune()
    assert len(measured) == len(kernels.TABLE)  # the second time from the file
    kernels.tune(again=True)
    assert len(measured) == 2 * len(kernels.TABLE)
    (known,) = json.loads(cache.read_text()).values()
    assert known.keys() == kernels.TABLE.keys()


def operation_of(calls: list[str], **fast: Kernel) -> Operation:
    def plain(x: torch.Tensor) -> torch.Tensor:
        calls.append("plain")
        return x

    return Operation("", ("plain", Kernel(plain)), {"cpu": fast}, lambda _: (torch.ones(2),))


def test_a_kernel_is_used_for_what_it_takes() -> None:
    calls: list[str] = []

    def fast(x: torch.Tensor) -> torch.Tensor:
        calls.append("fast")
        return x

    small = Kernel(fast, takes=lambda x: len(x) < 3)
    operation = operation_of(calls, fast=small)
    for size in (2, 3):
        operation(torch.ones(size))
    operation(torch.ones(2, device="meta"))  # of which the table knows nothing
    assert calls == ["fast", "plain", "plain"]
    assert [operation.pick(torch.ones(n)) for n in (2, 3)] == ["fast", "plain"]
    operation.learn("cpu", {"fast": 2.0, "plain": 1.0})
    assert operation.order["cpu"] == ["plain", "fast"]
    operation.learn("cpu", {"fast": None, "plain": 1.0})
    assert operation.order["cpu"] == ["plain"]


def test_what_is_never_used_is_measured_all_the_same() -> None:
    calls: list[str] = []
    prepared: list[int] = []

    def prepare(x: torch.Tensor) -> tuple[torch.Tensor, int]:
        prepared.append(len(x))
        return x, 7

    def packed(x: torch.Tensor, seven: int) -> None:
        calls.append(f"packed {seven}")

    never = Kernel(packed, prepare=prepare, never="it needs a second copy")
    cannot = Kernel(packed, takes=lambda x: False)
    operation = operation_of(calls, packed=never, cannot=cannot)
    times = operation.measure(CPU)
    assert list(times) == ["packed", "cannot", "plain"]
    assert times["cannot"] is None
    assert prepared == [2]
    assert calls[:2] == ["packed 7", "plain"]
    operation.learn("cpu", {"packed": 1.0, "cannot": None, "plain": 9.0})
    assert operation.order["cpu"] == ["plain"]


def test_what_is_slow_is_not_measured_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds for one call, where a processor lacks the instructions: the clock is the test's."""
    now, calls = [0.0], list[str]()

    def after(name: str, seconds: float) -> Any:
        def run(_: torch.Tensor) -> None:
            calls.append(name)
            now[0] += seconds

        return run

    monkeypatch.setattr(measured.time, "perf_counter", lambda: now[0])
    operation = operation_of([], slow=Kernel(after("slow", 3.0)), fast=Kernel(after("fast", 0.01)))
    times = operation.measure(CPU)
    assert (calls.count("slow"), calls.count("fast")) == (2, measured.ROUNDS)
    assert (times["slow"], times["fast"]) == (3e6, 1e4)


@pytest.mark.parametrize("content", ["", "[]", '{"other": 1}', "{"])
def test_a_broken_cache_is_measured_again(cache: Path, content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    kernels.tune()
    for operation in kernels.TABLE.values():
        chosen = operation.order["cpu"][0]
        times = operation.microseconds["cpu"]
        assert times[chosen] == min(times[n] or 1e9 for n in operation.order["cpu"])


BY_FP32 = "fp32, exact"  # of PyTorch's too, where the processor has no products of integers


def test_integer_products_by_fp32_are_exact() -> None:
    """Of the longest rows there are, and of the largest sums."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (3, 29568), dtype=torch.int8, generator=generator)
    weight = torch.randint(-127, 128, (5, 29568), dtype=torch.int8, generator=generator)
    x[0], weight[0] = 127, -127
    exact = x.long() @ weight.long().t()
    assert torch.equal(quantised_linear._integer_product_by_fp32(x, weight).long(), exact)
    operands = (torch.randn(4, 1032, dtype=torch.bfloat16), weight[:, :1032], torch.rand(5), None)
    assert torch.equal(
        quantised_linear.int8_linear_by_fp32(*operands), quantised_linear.int8_linear(*operands)
    )


def test_without_native_kernels_all_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: "not compiled")
    for name in ("norm", "rotate", "swiglu", "attention", "int8 rows", "step"):
        operation = kernels.TABLE[name]
        with torch.inference_mode():
            assert operation.pick(*operation.operands(CPU)) in (operation.plain[0], BY_FP32)
    kernels.tune()
    for name in ("norm", "rotate", "swiglu", "attention", "int8 rows", "step"):
        order = set(kernels.TABLE[name].order["cpu"])
        assert order - {BY_FP32} == {kernels.TABLE[name].plain[0]}


def test_gradients_and_other_number_types_go_through_pytorch(tiny: ModelConfig) -> None:
    model = Qwen2(tiny)
    init_weights(model, torch.Generator().manual_seed(0))
    ids = torch.arange(9)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        logits = model(ids, ids, model.packed([9]))
        logits.sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        with torch.inference_mode():
            again = model(ids, ids, model.packed([9]))
        torch.testing.assert_close(again, logits.detach(), atol=0.05, rtol=0.05)


def test_the_step_that_is_slower_is_not_taken(tiny: ModelConfig) -> None:
    from qwen2.inference.runner import Runner
    from qwen2.model.cache import KVStore

    model = Qwen2(tiny.model_copy(update={"hidden_size": 128, "intermediate_size": 128}))
    model.to(torch.bfloat16)
    store = KVStore(model.config, 64, model.dtype, model.device)
    step, plain = kernels.TABLE["step"], kernels.TABLE["step"].plain[0]
    if step.pick(model, store) == plain:
        pytest.skip(f"native kernels: {native.why_not()}")
    assert Runner(model, store, 16).step is not None
    step.learn("cpu", {kernels.NATIVE_STEP: 2.0, plain: 1.0})
    assert Runner(model, store, 16).step is None
