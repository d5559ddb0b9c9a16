"""Documents laid end to end as one call on CUDA: what it is given, and when it is chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from qwen2.model import kernels
from qwen2.model.attend import Documents, all_documents, each_document
from qwen2.model.attention import CausalScheme, PackedAttention
from qwen2.model.rope import Rope

LENGTHS = [5, 1, 20, 6]
H, K, D = 4, 2, 8


def operands(
    device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(sum(LENGTHS), heads, D, generator=generator).to(device, dtype).requires_grad_()
        for heads in (H, K, K)
    )
    return q, k, v


def reference(
    q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, max_q: int, max_k: int, /,
    **settings: Any,
) -> Tensor:  # fmt: skip
    """What the kernel does, by SDPA of each document; checks what it wants."""
    assert settings == {"window_size": (-1, 0), "enable_gqa": True}
    assert ends_q is ends_k
    assert (ends_q.dtype, ends_q.device) == (torch.int32, q.device)
    assert ends_q.tolist() == [0, 5, 6, 26, 32]
    assert (max_q, max_k) == (20, 20)
    out = []
    for start, stop in zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), strict=True):
        own = [x[start:stop].transpose(0, 1) for x in (q, k, v)]
        attended = F.scaled_dot_product_attention(
            own[0], own[1], own[2], is_causal=True, enable_gqa=True
        )
        out.append(attended)
    return torch.cat(out, dim=1).transpose(0, 1)


def test_one_call_is_given_all_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", reference)
    results = []
    for attend in (all_documents, each_document):
        inputs = operands()
        out = attend(*inputs, Documents(LENGTHS))
        out.square().sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    for one, each in zip(*results, strict=True):
        torch.testing.assert_close(one, each)


def test_where_documents_end_is_computed_once() -> None:
    documents = Documents(LENGTHS)
    assert documents.ends(torch.device("cpu")) is documents.ends(torch.device("cpu"))


def test_one_call_is_chosen_on_cuda_for_what_the_kernel_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    operation = kernels.TABLE["packed attention"]
    operation.forget()
    assert operation.order == {
        "cpu": [operation.plain[0]],
        "cuda": ["varlen", operation.plain[0]],
    }
    takes = operation.kernels["cuda"]["varlen"].takes
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    assert takes(torch.empty(3, H, 128, dtype=torch.bfloat16))
    assert not takes(torch.empty(3, H, 128))
    assert not takes(torch.empty(3, H, 128, dtype=torch.float16)), "its scores overflow"
    assert not takes(torch.empty(3, H, 264, dtype=torch.bfloat16))
    assert not takes(torch.empty(3, H, 36, dtype=torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert not takes(torch.empty(3, H, 128, dtype=torch.bfloat16))


def test_layers_with_a_window_do_not_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    operation, asked = kernels.TABLE["packed attention"], []

    def run(*operands: Any) -> Tensor:
        asked.append(operands[3])
        return each_document(*operands)

    monkeypatch.setattr(operation, "compiled", run)
    attention = PackedAttention(LENGTHS, CausalScheme([None, 4]))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    rotary = attention.rotary(Rope(D, 10_000.0), positions, torch.float32)
    plain, windowed = (attention.attend(layer, *operands(), rotary) for layer in (0, 1))
    assert asked == [attention.documents]
    first = slice(0, 4)  # a window of four sees all of them
    torch.testing.assert_close(plain[first], windowed[first])
    assert not torch.allclose(plain, windowed)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_one_call_equals_a_call_for_each_document() -> None:
    results = []
    for attend in (all_documents, each_document):
        inputs = operands("cuda", torch.bfloat16)
        out = attend(*inputs, Documents(LENGTHS))
        out.float().square().sum().backward()
        results.append([out, *(x.grad for x in inputs)])
    for one, each in zip(*results, strict=True):
        torch.testing.assert_close(one, each, atol=2e-2, rtol=2e-2)
