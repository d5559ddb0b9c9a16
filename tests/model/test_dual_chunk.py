"""Dual Chunk Attention against one dense score matrix of the three relative-position rules."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from qwen2.model import kernels
from qwen2.model.attend import Part, attend, plain_part
from qwen2.model.attention import CAUSAL, PackedAttention, Scheme
from qwen2.model.cache import KVStore, PagedAttention
from qwen2.model.config import DualChunk, ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.dual_chunk import DualChunkAttention, squared_temperature
from qwen2.model.rope import Rope, rotate

DEVICE = torch.device("cpu")
EXACT = {"atol": 1e-10, "rtol": 1e-10}

chunks = st.tuples(st.integers(2, 12), st.integers(1, 11)).filter(lambda x: x[1] < x[0])


def dense(q: Tensor, k: Tensor, v: Tensor, rope: Rope, chunk: DualChunk) -> Tensor:
    """The reference: every pair's distance by the rules, one rotation by it, one softmax."""
    T, H, _ = q.shape
    C, L = chunk.chunk_size, chunk.stride
    out = torch.empty_like(q)
    for i in range(T):
        distances = []
        for j in range(i + 1):
            if i // L == j // L:
                distances.append(i - j)
            elif i // L == j // L + 1:
                distances.append(min(i % L + L, C) - j % L)
            else:
                distances.append(min(2 * L - 1, C) - j % L)
        m = 1.0
        if chunk.original_max_position_embeddings:
            m = max(1.0, 0.1 * math.log((i + 1) / chunk.original_max_position_embeddings) + 1)
        for head in range(H):
            kv = head // (H // k.shape[1])
            # A query that has turned by the distance, against keys that have not turned at all.
            turned = rotate(
                q[i, head].expand(len(distances), 1, -1),
                rope.table(torch.tensor(distances), torch.float64),
            )[:, 0]
            scores = (turned * k[: i + 1, kv]).sum(-1) * m**2 / q.shape[-1] ** 0.5
            out[i, head] = scores.softmax(0) @ v[: i + 1, kv]
    return out


def random_qkv(T: int, K: int, G: int, D: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(T, heads, D, generator=generator, dtype=torch.float64)
        for heads in (K * G, K, K)
    )
    return q, k, v


def packed(scheme: Scheme, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    context = PackedAttention(lengths, scheme)
    positions = torch.cat([torch.arange(length) for length in lengths])
    rope = Rope(q.shape[-1], 100.0)
    return context.attend(0, q, k, v, context.rotary(rope, positions, q.dtype))


@given(
    chunk=chunks, T=st.integers(1, 50), K=st.integers(1, 2), G=st.integers(1, 3),
    trained=st.none() | st.integers(1, 30), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60)
def test_equals_the_dense_reference(
    chunk: tuple[int, int], T: int, K: int, G: int, trained: int | None, seed: int
) -> None:
    config = DualChunk(
        chunk_size=chunk[0], local_size=chunk[1], original_max_position_embeddings=trained
    )
    q, k, v = random_qkv(T, K, G, 6, seed)
    ours = packed(DualChunkAttention(config), q, k, v, [T])
    torch.testing.assert_close(ours, dense(q, k, v, Rope(6, 100.0), config), **EXACT)


@given(
    chunk=chunks, cuts=st.lists(st.integers(1, 13), min_size=1, max_size=7), G=st.integers(1, 3),
    trained=st.none() | st.integers(1, 30), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60)
def test_prefill_from_anywhere_then_decode_equals_one_pass(
    chunk: tuple[int, int], cuts: list[int], G: int, trained: int | None, seed: int
) -> None:
    """Pieces that begin and end in the middle of chunks; a last chunk of one token."""
    scheme = DualChunkAttention(
        DualChunk(
            chunk_size=chunk[0], local_size=chunk[1], original_max_position_embeddings=trained
        )
    )
    q, k, v = random_qkv(sum(cuts), 2, G, 6, seed)
    config = ModelConfig(
        vocab_size=9, hidden_size=12 * G, intermediate_size=9, num_hidden_layers=1,
        num_attention_heads=2 * G, num_key_value_heads=2,
    )  # fmt: skip
    store = KVStore(config, len(q), torch.float64, DEVICE)
    slots = torch.randperm(len(q), generator=torch.Generator().manual_seed(seed))
    rope, outs, end = Rope(6, 100.0), [], 0
    for qs, ks, vs in zip(q.split(cuts), k.split(cuts), v.split(cuts), strict=True):
        end += len(qs)
        context = PagedAttention(store, [slots[:end]], [len(qs)], scheme)
        rotary = context.rotary(rope, context.positions(DEVICE), torch.float64)
        outs.append(context.attend(0, qs, ks, vs, rotary))
    torch.testing.assert_close(torch.cat(outs), packed(scheme, q, k, v, [len(q)]), **EXACT)


@pytest.mark.parametrize(("C", "w"), [(8, 2), (8, 5), (9, 1), (6, 4), (16, 15)])
def test_short_sequences_have_their_true_distances(C: int, w: int) -> None:
    """Up to min(C + 1, 2L) tokens DCA is ordinary attention; one token more, and it is not."""
    scheme = DualChunkAttention(DualChunk(chunk_size=C, local_size=w))
    limit = min(C + 1, 2 * (C - w))
    for T in range(1, limit + 2):
        q, k, v = random_qkv(T, 1, 2, 6, T)
        same = torch.allclose(
            packed(scheme, q, k, v, [T]), packed(CAUSAL, q, k, v, [T]), atol=1e-10, rtol=1e-10
        )
        assert same == (limit >= T)


def test_within_a_chunk_it_is_the_same_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """One part, the same kernel, the same bits as ordinary attention."""
    calls: list[int] = []

    def counted(parts: list[Part]) -> Tensor:
        calls.append(len(parts))
        return attend(parts)

    monkeypatch.setattr("qwen2.model.dual_chunk.attend", counted)
    scheme = DualChunkAttention(DualChunk(chunk_size=40, local_size=8))
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (x.to(dtype) for x in random_qkv(32, 2, 2, 8, 0))
        assert torch.equal(packed(scheme, q, k, v, [32]), packed(CAUSAL, q, k, v, [32]))
    assert calls == [1, 1]


def test_documents_do_not_see_each_other() -> None:
    scheme = DualChunkAttention(DualChunk(chunk_size=8, local_size=3))
    lengths = [1, 23, 6, 11]
    q, k, v = random_qkv(sum(lengths), 2, 2, 6, 1)
    together = packed(scheme, q, k, v, lengths)
    for out, *document in zip(*(x.split(lengths) for x in (together, q, k, v)), strict=True):
        torch.testing.assert_close(out, packed(scheme, *document, [len(out)]), **EXACT)


@given(chunk=chunks, lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3))
@settings(max_examples=30)
def test_gradients_equal_those_of_the_plain_path(
    chunk: tuple[int, int], lengths: list[int]
) -> None:
    """The kernel's own backward with the merged output and lse, against autograd."""
    scheme = DualChunkAttention(DualChunk(chunk_size=chunk[0], local_size=chunk[1]))
    inputs = random_qkv(sum(lengths), 2, 2, 6, 2)
    weight = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(3)).double()

    def gradients() -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        (packed(scheme, *leaves, lengths) * weight).sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    fast = gradients()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels.TABLE["merged attention"], "order", {})
        plain = gradients()
    assert len(fast) == len(plain) == 3
    for ours, reference in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, reference, **EXACT)


@given(
    sizes=st.lists(st.tuples(st.integers(1, 20), st.booleans()), min_size=2, max_size=4),
    T=st.integers(1, 20), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=40)
def test_parts_merge_to_one_softmax(sizes: list[tuple[int, bool]], T: int, seed: int) -> None:
    """Any number of parts, causal or not, against one softmax over all their scores."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    parts = [
        Part(normal(T, 4, 6), *(normal(T if causal else S, 2, 6) for _ in "kv"), causal)
        for S, causal in sizes
    ]
    expected = torch.empty(T, 4, 6, dtype=torch.float64)
    for t in range(T):
        for head in range(4):
            seen = [slice(0, t + 1) if part.causal else slice(None) for part in parts]
            scores = torch.cat(
                [p.k[s, head // 2] @ p.q[t, head] for p, s in zip(parts, seen, strict=True)]
            )
            values = torch.cat([p.v[s, head // 2] for p, s in zip(parts, seen, strict=True)])
            expected[t, head] = (scores / 6**0.5).softmax(0) @ values
    torch.testing.assert_close(attend(parts), expected, **EXACT)


def test_the_plain_reference_works_in_blocks() -> None:
    q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in random_qkv(600, 2, 1, 4, 5))
    out, lse = plain_part(q, k, v, causal=True)
    scores = (q @ k.mT / 2).masked_fill(torch.ones(600, 600).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ v, **EXACT)
    torch.testing.assert_close(lse, scores.logsumexp(-1), **EXACT)


def test_bf16_parts_are_merged_in_fp32() -> None:
    """A merge in bf16 would round each weight: the error must stay that of one bf16 result."""
    q, k, v = (x.to(torch.bfloat16) for x in random_qkv(300, 2, 2, 16, 0))
    exact = random_qkv(300, 2, 2, 16, 0)
    scheme = DualChunkAttention(DualChunk(chunk_size=24, local_size=8))
    reference = packed(scheme, *(x.bfloat16().double() for x in exact), [300])
    one_part = packed(CAUSAL, q, k, v, [300]).double()
    one_reference = packed(CAUSAL, *(x.bfloat16().double() for x in exact), [300])
    ours = (packed(scheme, q, k, v, [300]).double() - reference).abs().mean()
    ordinary = (one_part - one_reference).abs().mean()
    assert ours < 1.5 * ordinary


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operator makes."""

    elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        made = result if isinstance(result, tuple) else (result,)
        sizes = [
            x.untyped_storage().nbytes() // x.element_size() for x in made if isinstance(x, Tensor)
        ]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_grows_with_the_square_of_the_length(dtype: torch.dtype) -> None:
    """Forward, backward, and a prefill that goes on: at most all queries of one pass, T·H·D."""
    T, H, D = 4096, 4, 8
    scheme = DualChunkAttention(
        DualChunk(chunk_size=512, local_size=64, original_max_position_embeddings=512)
    )
    q, k, v = (x.to(dtype) for x in random_qkv(T, 2, 2, D, 0))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with Largest() as whole:
        packed(scheme, *leaves, [T]).float().square().mean().backward()
    assert whole.elements <= 2 * T * H * D
    config = ModelConfig(
        vocab_size=9, hidden_size=H * D, intermediate_size=9, num_hidden_layers=1,
        num_attention_heads=H, num_key_value_heads=2,
    )  # fmt: skip
    for some, slots in itertools.product((scheme, CAUSAL), (torch.arange(T), torch.randperm(T))):
        store = KVStore(config, T, dtype, DEVICE)
        with torch.no_grad(), Largest() as pieces:
            for end in range(1024, T + 1, 1024):
                new = slice(end - 1024, end)
                context = PagedAttention(store, [slots[:end]], [1024], some)
                rotary = context.rotary(Rope(D, 100.0), context.positions(DEVICE), dtype)
                context.attend(0, q[new], k[new], v[new], rotary)
        assert pieces.elements <= T * H * D


def test_temperature_by_hand() -> None:
    """L0 = 100: 1 up to position 99; at 271 the context is e times 100, so m = 1.1."""
    m2 = squared_temperature(torch.tensor([0, 99, 271, 99_999]), 100, torch.bfloat16)
    assert m2[:2].tolist() == [1.0, 1.0]
    assert m2[2].item() == pytest.approx((1 + 0.1 * math.log(2.72)) ** 2)
    assert m2[3].item() == pytest.approx((1 + 0.1 * math.log(1000)) ** 2)


MODEL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def build(**changes: Any) -> Qwen2:
    model = Qwen2(ModelConfig(**MODEL, **changes))
    init_weights(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1
            )
    return model


def full(model: Qwen2, tokens: Tensor) -> Tensor:
    return model(tokens, torch.arange(len(tokens)), model.packed([len(tokens)]))


@torch.no_grad()
def test_a_model_decodes_what_it_would_have_seen_in_one_pass() -> None:
    """Through the decoder, in a batch of sequences of different lengths, over many chunks."""
    chunk = DualChunk(chunk_size=12, local_size=4, original_max_position_embeddings=12)
    model = build(dual_chunk=chunk)
    assert isinstance(model.scheme, DualChunkAttention)
    tokens = torch.randint(0, 50, (70,), generator=torch.Generator().manual_seed(1))
    prompts = [tokens, tokens[5:40]]
    store = KVStore(model.config, 120, torch.float32, DEVICE)
    tables = torch.randperm(120, generator=torch.Generator().manual_seed(1)).split([80, 40])
    ends = [0, 0]
    outs: list[list[Tensor]] = [[], []]
    for sizes in ([30, 9], [30, 17], *([1, 1],) * 9, [1, 0]):
        live = [i for i, size in enumerate(sizes) if size]
        starts = [ends[i] for i in live]
        counts = [sizes[i] for i in live]
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
        context = model.cached(store, [tables[i][: ends[i]] for i in live], counts)
        new = [prompts[i][s : s + n] for i, s, n in zip(live, starts, counts, strict=True)]
        logits = model(torch.cat(new), context.positions(DEVICE), context)
        for i, rows in zip(live, logits.split(counts), strict=True):
            outs[i].append(rows)
    for prompt, parts in zip(prompts, outs, strict=True):
        torch.testing.assert_close(torch.cat(parts), full(model, prompt), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_below_the_trained_length_nothing_changes() -> None:
    chunk = DualChunk(chunk_size=64, local_size=4, original_max_position_embeddings=64)
    extended, plain = build(dual_chunk=chunk), build()
    tokens = torch.randint(0, 50, (100,), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(
        full(extended, tokens[:64]), full(plain, tokens[:64]), atol=1e-6, rtol=1e-6
    )
    assert (full(extended, tokens) - full(plain, tokens)).abs().max() > 1e-3


def test_training_through_chunks_reaches_every_parameter() -> None:
    model = build(dual_chunk=DualChunk(chunk_size=8, local_size=2))
    tokens = torch.randint(0, 50, (40,), generator=torch.Generator().manual_seed(1))
    torch.nn.functional.cross_entropy(full(model, tokens)[:-1], tokens[1:]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all(), name
        # softmax does not see a bias of all keys through one rotation, but these have several
        assert parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_fp16_scores_do_not_overflow_in_any_part() -> None:
    q, k, v = (40 * x.clamp(-1, 1).to(torch.float16) for x in random_qkv(64, 2, 2, 64, 0))
    scheme = DualChunkAttention(DualChunk(chunk_size=12, local_size=4))
    out = packed(scheme, q, k, v, [64])
    assert out.dtype == torch.float16
    reference = packed(scheme, q.double(), k.double(), v.double(), [64])
    assert (out.double() - reference).abs().mean() < 0.05


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu() -> None:
    scheme = DualChunkAttention(DualChunk(chunk_size=24, local_size=8))
    q, k, v = (x.to("cuda", torch.bfloat16) for x in random_qkv(200, 2, 2, 64, 0))
    context = PackedAttention([200], scheme)
    rotary = context.rotary(Rope(64, 100.0), torch.arange(200, device="cuda"), q.dtype)
    on_cpu = packed(scheme, q.cpu().float(), k.cpu().float(), v.cpu().float(), [200])
    out = context.attend(0, q, k, v, rotary).cpu().float()
    torch.testing.assert_close(out, on_cpu, atol=3e-2, rtol=3e-2)
