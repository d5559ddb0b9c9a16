"""The table of kernels: what is chosen, and that all choices give the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qwen2.model import kernels, native


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for operation in kernels.TABLE.values():
        monkeypatch.setattr(operation, "chosen", "")
        monkeypatch.setattr(operation, "microseconds", {})
    return tmp_path / "qwen2" / "kernels.json"


@pytest.mark.parametrize("name", kernels.TABLE)
def test_every_kernel_gives_the_same(name: str) -> None:
    operation = kernels.TABLE[name]
    generator = torch.Generator().manual_seed(0)
    operands = operation.operands()
    for x in operands:
        for tensor in x if isinstance(x, tuple) else [x]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.normal_(0, 0.5, generator=generator)
    results = []
    for kernel in operation.usable():  # some write over their first operand
        first = operands[0].clone()
        results.append(operation.kernels[kernel](first, *operands[1:]).float())
    for other in results[1:]:  # bf16, and int4 with and without 8-bit activations
        assert (other - results[0]).abs().max() < 0.03 * results[0].abs().max()


def test_the_fastest_is_chosen_and_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def measure(operation: kernels.Operation) -> dict[str, float]:
        measured.append(operation)
        return {kernel: 9.0 - i for i, kernel in enumerate(operation.usable())}

    monkeypatch.setattr(kernels, "_measure", measure)
    kernels.tune()
    for operation in kernels.TABLE.values():
        assert operation.chosen == operation.usable()[-1]
    kernels.tune()
    assert len(measured) == len(kernels.TABLE)  # the second time from the file
    kernels.tune(again=True)
    assert len(measured) == 2 * len(kernels.TABLE)
    (known,) = json.loads(cache.read_text()).values()
    assert known.keys() == kernels.TABLE.keys()


@pytest.mark.parametrize("content", ["", "[]", '{"other": 1}', "{"])
def test_a_broken_cache_is_measured_again(cache: Path, content: str) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text(content)
    kernels.tune()
    assert all(operation.chosen for operation in kernels.TABLE.values())


def test_without_native_kernels_all_is_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_library", lambda: "not compiled")
    kernels.tune()
    for operation in kernels.TABLE.values():
        assert operation.chosen not in operation.needs_native
        assert operation.chosen
