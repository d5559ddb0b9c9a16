"""Logits and gradients equal transformers' Qwen2ForCausalLM with copied weights."""

from __future__ import annotations

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from qwen2.model.attention import PackedAttention, causal_attention
from qwen2.model.cache import KVStore, PagedAttention
from qwen2.model.config import ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.hf_config import config_to_hf
from qwen2.model.rope import Rope, rotate

CPU = torch.device("cpu")
SHAPES = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 4},
    "small base": {"rope_theta": 10_000.0, "rms_norm_eps": 1e-5},
}


def build(config: ModelConfig, seed: int = 0) -> Qwen2:
    """A model whose every parameter is random: biases and norms too, else they are not tested."""
    generator = torch.Generator().manual_seed(seed)
    model = Qwen2(config).eval()
    init_weights(model, generator)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model


def oracle(model: Qwen2) -> transformers.Qwen2ForCausalLM:
    config = transformers.Qwen2Config(**config_to_hf(model.config, "float32"))
    other = transformers.Qwen2ForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def tokens_of(config: ModelConfig, count: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (count,), generator=generator)


def alone(model: Qwen2, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, torch.arange(len(tokens)), PackedAttention([len(tokens)]))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_logits_equal_transformers(tiny: ModelConfig, shape: str) -> None:
    model = build(tiny.model_copy(update=SHAPES[shape]))
    tokens = tokens_of(tiny, 67)
    torch.testing.assert_close(
        alone(model, tokens), oracle(model)(tokens[None]).logits[0], atol=1e-5, rtol=1e-5
    )


def test_gradients_equal_transformers(tiny: ModelConfig) -> None:
    model = build(tiny)
    other = oracle(model)
    tokens = tokens_of(tiny, 40)
    torch.nn.functional.cross_entropy(alone(model, tokens)[:-1], tokens[1:]).backward()
    other(tokens[None], labels=tokens[None]).loss.backward()
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m
        )


@torch.no_grad()
def test_packed_documents_equal_each_alone(tiny: ModelConfig) -> None:
    model = build(tiny)
    other = oracle(model)
    lengths = [1, 17, 2, 30]
    tokens = tokens_of(tiny, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])
    packed = model(tokens, positions, PackedAttention(lengths))
    for document, logits in zip(tokens.split(lengths), packed.split(lengths), strict=True):
        torch.testing.assert_close(logits, alone(model, document), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(logits, other(document[None]).logits[0], atol=1e-5, rtol=1e-5)


@given(
    cuts=st.lists(st.integers(1, 20), min_size=1, max_size=8), seed=st.integers(0, 99),
    scattered=st.booleans(),
)  # fmt: skip
@settings(max_examples=40)
@torch.no_grad()
def test_cache_equals_no_cache(cuts: list[int], seed: int, scattered: bool) -> None:
    """A prefill in any chunks, then single tokens, in any slots, equals one full pass."""
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = build(config, seed)
    tokens = tokens_of(config, sum(cuts), seed)
    store = KVStore(config, 2 * len(tokens) + 3, torch.float32, CPU)
    slots = torch.arange(len(tokens)) + 3
    if scattered:
        slots = torch.randperm(store.slots, generator=torch.Generator().manual_seed(seed))
    parts, end = [], 0
    for chunk in tokens.split(cuts):
        end += len(chunk)
        attention = PagedAttention(store, [slots[:end]], [len(chunk)])
        parts.append(model(chunk, attention.positions(CPU), attention))
    torch.testing.assert_close(torch.cat(parts), alone(model, tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_batched_equals_alone(tiny: ModelConfig) -> None:
    """Sequences of different lengths share passes; each sees its own cache only."""
    model = build(tiny)
    other = oracle(model)
    prompts = [tokens_of(tiny, length, seed=length) for length in (3, 29, 1)]
    store = KVStore(tiny, 40, torch.float32, CPU)
    tables = torch.randperm(40, generator=torch.Generator().manual_seed(0)).split((3, 29, 8))
    lengths = [0] * len(prompts)
    fed = [(prompt[:1], prompt[1:]) if len(prompt) > 1 else (prompt,) for prompt in prompts]
    last: list[torch.Tensor] = [torch.empty(0)] * len(prompts)
    for turn in range(2):
        live = [i for i, parts in enumerate(fed) if turn < len(parts)]
        chunks = [fed[i][turn] for i in live]
        for i, chunk in zip(live, chunks, strict=True):
            lengths[i] += len(chunk)
        attention = PagedAttention(
            store, [tables[i][: lengths[i]] for i in live], [len(c) for c in chunks]
        )
        logits = model(
            torch.cat(chunks), attention.positions(CPU), attention, attention.last_rows(CPU)
        )
        for i, row in zip(live, logits, strict=True):
            last[i] = row
    for prompt, row in zip(prompts, last, strict=True):
        torch.testing.assert_close(row, alone(model, prompt)[-1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(row, other(prompt[None]).logits[0, -1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_slots_are_used_again(tiny: ModelConfig) -> None:
    """What another sequence has left there makes no difference."""
    model = build(tiny)
    tokens = tokens_of(tiny, 12)
    store = KVStore(tiny, 30, torch.float32, CPU)
    for chunk in (tokens_of(tiny, 30, seed=9), tokens):
        attention = PagedAttention(store, [torch.arange(len(chunk))], [len(chunk)])
        logits = model(chunk, attention.positions(CPU), attention)
    torch.testing.assert_close(logits, alone(model, tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_sequence_has_what_another_computes_in_the_same_pass(tiny: ModelConfig) -> None:
    """The second begins with 8 tokens of the first, and computes only what follows."""
    model = build(tiny)
    first, rest = tokens_of(tiny, 20), tokens_of(tiny, 5, seed=2)
    store = KVStore(tiny, 40, torch.float32, CPU)
    tables = [torch.arange(20), torch.cat([torch.arange(8), torch.arange(30, 35)])]
    attention = PagedAttention(store, tables, [20, 5])
    logits = model(torch.cat([first, rest]), attention.positions(CPU), attention)
    expected = alone(model, torch.cat([first[:8], rest]))[8:]
    torch.testing.assert_close(logits[20:], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_single_row_takes_the_same_values(tiny: ModelConfig) -> None:
    """The matrix-vector path against the matrix-matrix path, in both number types."""
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        layer = build(tiny).to(dtype).model.layers[0]
        x = torch.randn(2, tiny.hidden_size, generator=torch.Generator().manual_seed(3)).to(dtype)
        for linear in (layer.self_attn.q_proj, layer.mlp.gate_proj):
            torch.testing.assert_close(linear(x[:1]), linear(x)[:1], atol=tolerance, rtol=tolerance)


@torch.no_grad()
def test_bf16_equals_transformers_in_its_precision(tiny: ModelConfig) -> None:
    model = build(tiny).to(torch.bfloat16)
    exact = build(tiny)
    tokens = tokens_of(tiny, 50)
    theirs = oracle(build(tiny)).to(torch.bfloat16)(tokens[None]).logits[0].float()
    reference = alone(exact, tokens)
    ours_error = (alone(model, tokens).float() - reference).abs().mean()
    their_error = (theirs - reference).abs().mean()
    assert ours_error < 1.25 * their_error


@torch.no_grad()
def test_fp16_scores_do_not_overflow() -> None:
    """Keys and queries as large as layer 0 of the 0.5B makes them: |q·k| beyond fp16's 65,504."""
    q = torch.full((5, 4, 64), 40.0, dtype=torch.float16)
    k = torch.full((5, 2, 64), 40.0, dtype=torch.float16)  # q·k = 102,400
    k[0] *= 0.9
    v = torch.arange(5.0).to(torch.float16)[:, None, None].expand(5, 2, 64).contiguous()
    out = causal_attention(q, k, v)
    assert out.dtype == torch.float16
    exact = causal_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(out.double(), exact, atol=2e-3, rtol=2e-3)
    single = causal_attention(q[:1], k, v)
    torch.testing.assert_close(
        single.double(), causal_attention(q[:1].double(), k.double(), v.double()),
        atol=2e-3, rtol=2e-3,
    )  # fmt: skip


@given(
    T=st.integers(1, 9), past=st.integers(0, 9), K=st.integers(1, 3), G=st.integers(1, 3),
    seed=st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=50)
def test_attention_equals_its_formula(T: int, past: int, K: int, G: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    D, S = 6, T + past
    q = torch.randn(T, K * G, D, generator=generator, dtype=torch.float64)
    k = torch.randn(S, K, D, generator=generator, dtype=torch.float64)
    v = torch.randn(S, K, D, generator=generator, dtype=torch.float64)
    expected = torch.empty_like(q)
    for t in range(T):
        for head in range(K * G):
            seen = slice(0, past + t + 1)
            scores = k[seen, head // G] @ q[t, head] / D**0.5
            expected[t, head] = scores.softmax(0) @ v[seen, head // G]
    torch.testing.assert_close(causal_attention(q, k, v), expected, atol=1e-12, rtol=1e-12)


def test_rotation_by_hand() -> None:
    """θ = 100, D = 4: frequencies 1 and 0.1; unit 0 turns with unit 2, unit 1 with unit 3."""
    rope = Rope(head_dim=4, theta=100.0)
    cos, sin = rope.table(torch.tensor([3]), torch.float64)
    angles = torch.tensor([3.0, 0.3], dtype=torch.float64)
    torch.testing.assert_close(cos[0, 0], angles.cos(), atol=1e-7, rtol=0)
    x = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]], dtype=torch.float64)
    expected = torch.stack(
        [angles[0].cos(), -2 * angles[1].sin(), angles[0].sin(), 2 * angles[1].cos()]
    )
    torch.testing.assert_close(rotate(x, (cos, sin))[0, 0], expected, atol=1e-6, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_fused_projections_change_no_name_and_no_value(tiny: ModelConfig, tied: bool) -> None:
    model = build(tiny.model_copy(update={"tie_word_embeddings": tied}))
    tokens = tokens_of(tiny, 20)
    before, state = alone(model, tokens), {k: v.clone() for k, v in model.state_dict().items()}
    model.fuse_projections()
    assert all(layer.self_attn.projections.fused for layer in model.model.layers)
    torch.testing.assert_close(alone(model, tokens), before, atol=1e-6, rtol=1e-6)
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], state[name]) for name in state)


@torch.no_grad()
def test_fused_projections_see_every_later_change(tiny: ModelConfig) -> None:
    """Weights that change in place are the fused ones; weights that move are noticed."""
    model, other = build(tiny), build(tiny, seed=5)
    tokens = tokens_of(tiny, 20)
    model.fuse_projections()
    model.load_state_dict(other.state_dict())  # in place
    assert model.model.layers[0].mlp.projections.fused
    torch.testing.assert_close(alone(model, tokens), alone(other, tokens), atol=1e-6, rtol=1e-6)
    model.load_state_dict(build(tiny).state_dict(), assign=True)  # other memory
    assert not model.model.layers[0].mlp.projections.fused
    torch.testing.assert_close(
        alone(model, tokens), alone(build(tiny), tokens), atol=1e-6, rtol=1e-6
    )
    model.fuse_projections()
    wide = model.double()
    torch.testing.assert_close(
        alone(wide, tokens), alone(build(tiny).double(), tokens), atol=1e-12, rtol=1e-12
    )


def test_training_a_fused_model_trains_its_parameters(tiny: ModelConfig) -> None:
    fused, plain = build(tiny), build(tiny)
    fused.fuse_projections()
    tokens = tokens_of(tiny, 20)
    for model in (fused, plain):
        torch.nn.functional.cross_entropy(alone(model, tokens)[:-1], tokens[1:]).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in fused.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-6, rtol=1e-5)
