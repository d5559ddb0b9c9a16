"""Threads that each compute alone; memory that is free."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from qwen2.common import runtime
from qwen2.common.runtime import fp32_products, free_memory, in_threads, peak_memory


def test_every_item_is_done_once_by_threads_of_one() -> None:
    done: list[int] = []
    seen: set[int] = set()

    def work(item: int) -> None:
        done.append(item)
        seen.add(torch.get_num_threads())

    before = torch.get_num_threads()
    in_threads(work, [(i,) for i in range(20)])
    assert sorted(done) == list(range(20))
    assert seen == {1}
    assert torch.get_num_threads() == before


def test_modes_of_the_caller_hold_and_errors_arrive() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    modes: list[tuple[bool, bool]] = []

    def work(_: int) -> None:
        modes.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        torch.mul(parameter, 2, out=torch.empty(2))  # refused while gradients are on

    in_threads(work, [(0,)])
    with torch.inference_mode():
        in_threads(work, [(0,)])
    assert modes == [(False, False), (False, True)]
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError):
        in_threads(lambda x: 1 / x, [(0,)])
    assert torch.get_num_threads() == before


def test_free_memory_is_some_of_the_machine() -> None:
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < free_memory(torch.device("cpu")) < machine


def test_peak_memory_is_what_was_held_though_it_is_given_back() -> None:
    """In a process of its own: this one may have held much more before."""
    program = (
        "import torch; from qwen2.common.runtime import peak_memory; cpu = torch.device('cpu')\n"
        "before = peak_memory(cpu); block = torch.ones(64 << 20); held = peak_memory(cpu)\n"
        "del block; print(before, held, peak_memory(cpu))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    before, held, after = map(int, printed.stdout.split())
    assert 200 << 20 < held - before < 300 << 20
    assert after > held - (8 << 20)  # Linux counts in batches


def test_peak_memory_on_cuda_is_that_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 if device.index else 7)
    assert peak_memory(torch.device("cuda:1")) == 5


@pytest.mark.parametrize("able", [False, True])
def test_products_are_rounded_until_left(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(runtime, "say", said.append)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    backend, cpu = torch.backends.mkldnn.matmul, torch.device("cpu")
    before = backend.fp32_precision
    a, b = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = a @ b

    @fp32_products(True, cpu)
    def fail() -> None:
        assert backend.fp32_precision == "bf16"
        torch.testing.assert_close(a @ b, exact, atol=0.3, rtol=0)  # 64 terms, 8 bits each
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert backend.fp32_precision == before
    assert len(said) == (not able)
    with fp32_products(False, cpu):
        assert backend.fp32_precision == before


def test_products_are_rounded_to_tf32_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    with fp32_products(True, torch.device("cuda")):
        assert backend.fp32_precision == "tf32"
    assert backend.fp32_precision == before
