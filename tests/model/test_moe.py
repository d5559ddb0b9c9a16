"""Mixtures: experts, routing, statistics and losses against transformers and by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from qwen2.model import kernels
from qwen2.model.attention import PackedAttention
from qwen2.model.cache import KVStore
from qwen2.model.config import PUBLISHED, Mixture, ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.model.experts import grouped_experts, loop_experts
from qwen2.model.extend import extended
from qwen2.model.hf_config import config_to_hf
from qwen2.model.moe import MoE, Routing, expert_entropy, expert_share, route, router_logits
from qwen2.model.operation import Kernel

CPU = torch.device("cpu")


def changed(config: ModelConfig, **changes: object) -> ModelConfig:
    """`config` with other settings of its mixture."""
    assert config.moe is not None
    return config.model_copy(update={"moe": config.moe.model_copy(update=changes)})


def build(config: ModelConfig, seed: int = 0) -> Qwen2:
    """A model whose every parameter is random, and whose routers are far from even."""
    generator = torch.Generator().manual_seed(seed)
    model = Qwen2(config).eval()
    init_weights(model, generator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.5 if "mlp.gate." in name else 0.1
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model


def oracle(model: Qwen2, **settings: object) -> transformers.Qwen2MoeForCausalLM:
    config = transformers.Qwen2MoeConfig(**config_to_hf(model.config, "float32") | settings)
    other = transformers.Qwen2MoeForCausalLM(config).eval()
    other.load_state_dict(model.state_dict())  # in memory, transformers 5 has the same names
    return other


def tokens_of(config: ModelConfig, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, config.vocab_size, (count,), generator=generator)


def alone(model: Qwen2, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens, torch.arange(len(tokens)), PackedAttention([len(tokens)]))


def routing_of(model: Qwen2, tokens: torch.Tensor) -> Routing:
    assert model.config.moe is not None
    routing = Routing(model.config.moe, CPU)
    attention = PackedAttention([len(tokens)])
    model.model(tokens, torch.arange(len(tokens)), attention, routing)
    return routing


@pytest.mark.parametrize("norm", [False, True])
@torch.no_grad()
def test_logits_equal_transformers(mixture: ModelConfig, norm: bool) -> None:
    model = build(changed(mixture, norm_topk_prob=norm))
    tokens = tokens_of(mixture, 67)
    theirs = oracle(model)(tokens[None]).logits[0]
    torch.testing.assert_close(alone(model, tokens), theirs, atol=1e-5, rtol=1e-5)


def test_gradients_equal_transformers_with_its_balance_loss(mixture: ModelConfig) -> None:
    model = build(changed(mixture, router_aux_loss_coef=0.3))
    other = oracle(model, output_router_logits=True)
    tokens = tokens_of(mixture, 40)
    assert model.config.moe is not None
    routing = Routing(model.config.moe, CPU)
    hidden = model.model(tokens, torch.arange(40), PackedAttention([40]), routing)
    loss = F.cross_entropy(model.lm_head(hidden)[:-1], tokens[1:])
    (loss + 0.3 * routing.balance_loss()).backward()
    result = other(tokens[None], labels=tokens[None])
    result.loss.backward()
    assert routing.balance_loss().item() == pytest.approx(result.aux_loss.item(), rel=1e-5)
    theirs = dict(other.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(
            parameter.grad, theirs[name].grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: n + m
        )


def test_the_57b_has_the_published_parameters() -> None:
    with torch.device("meta"):
        model = Qwen2(PUBLISHED["57b-a14b"])
    assert sum(p.numel() for p in model.parameters()) == 57_408_658_944
    assert model.model.layers[27].mlp.experts.gate_up_proj.shape == (64, 2 * 2560, 3584)


@torch.no_grad()
def test_without_shared_experts(mixture: ModelConfig) -> None:
    """Of no width, they are not there; transformers keeps empty ones, which add nothing."""
    model = build(changed(mixture, shared_expert_intermediate_size=0))
    assert not [name for name in model.state_dict() if "shared" in name]
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters()
    config = transformers.Qwen2MoeConfig(**config_to_hf(model.config, "float32"))
    other = transformers.Qwen2MoeForCausalLM(config).eval()
    missing = other.load_state_dict(model.state_dict(), strict=False).missing_keys
    assert all("shared_expert" in name for name in missing)
    tokens = tokens_of(mixture, 20)
    theirs = other(tokens[None]).logits[0]
    torch.testing.assert_close(alone(model, tokens), theirs, atol=1e-5, rtol=1e-5)


def test_a_layer_by_hand() -> None:
    """C = 1: two experts of three, p = (1/2, 1/3, 1/6); shared gate sigmoid(0)."""
    moe = Mixture(
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=1,
        shared_expert_intermediate_size=1,
    )
    config = ModelConfig(
        vocab_size=1, hidden_size=2, intermediate_size=1, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1, moe=moe,
    )  # fmt: skip
    layer = MoE(config).double()
    assert layer.shared_expert is not None
    with torch.no_grad():
        layer.gate.weight.copy_(
            torch.tensor([[math.log(3)], [math.log(2)], [0.0]]) * torch.eye(2)[:1]
        )
        layer.experts.gate_up_proj.fill_(0.0)
        # gate = 1 and up = 2, 3, 7 of x = (1, 0); down to the second unit
        layer.experts.gate_up_proj[:, 0, 0] = 1.0
        layer.experts.gate_up_proj[:, 1, 0] = torch.tensor([2.0, 3.0, 7.0])
        layer.experts.down_proj.copy_(torch.tensor([0.0, 1.0]).view(1, 2, 1).expand(3, 2, 1))
        layer.shared_expert_gate.weight.fill_(0.0)
        layer.shared_expert.gate_proj.weight.fill_(1.0)
        layer.shared_expert.up_proj.weight.fill_(10.0)
        layer.shared_expert.down_proj.weight.copy_(torch.tensor([[1.0], [0.0]]))
    silu = 1 / (1 + math.exp(-1))
    y = layer(torch.tensor([[1.0, 0.0]], dtype=torch.float64))
    expected = torch.tensor([[0.5 * 10 * silu, (2 / 2 + 3 / 3) * silu]], dtype=torch.float64)
    torch.testing.assert_close(y, expected, atol=1e-7, rtol=1e-7)


@given(
    N=st.integers(1, 12), E=st.integers(1, 9), C=st.integers(1, 9), width=st.integers(1, 9),
    data=st.data(), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60)
def test_grouped_equals_loop(
    N: int, E: int, C: int, width: int, data: st.DataObject, seed: int
) -> None:
    """In value and in every gradient; few tokens leave experts without any."""
    k = data.draw(st.integers(1, E))
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(N, E, generator=generator).argsort(-1)[:, :k]
    shapes = [(N, C), (E, 2 * width, C), (E, C, width), (N, k)]
    first = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    dy = torch.randn(N, C, generator=generator, dtype=torch.float64)
    results = []
    for experts in (grouped_experts, loop_experts):
        x, gate_up, down, weights = (t.clone().requires_grad_() for t in first)
        y = experts(x, gate_up, down, ids, weights)
        y.backward(dy)
        results.append([y, x.grad, gate_up.grad, down.grad, weights.grad])
        with torch.no_grad():
            assert torch.allclose(experts(x, gate_up, down, ids, weights), y, rtol=1e-12)
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_equals_loop_in_every_number_type(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 16), (8, 48, 16), (8, 16, 24), (40, 3)]
    first = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    ids = torch.rand(40, 8, generator=generator).argsort(-1)[:, :3]
    results = []
    for experts, type_ in ((grouped_experts, dtype), (loop_experts, torch.float64)):
        inputs = [t.to(type_).requires_grad_() for t in first]
        y = experts(*inputs[:3], ids, inputs[3])
        y.sum().backward()  # its gradient has strides of 0
        results.append([y, *(t.grad for t in inputs)])
    for ours, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        error = (ours.double() - exact).norm() / exact.norm()
        assert error < 20 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torch_s_grouped_product_gives_the_same(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What CUDA gets: `grouped_mm` after the sort, which works on the CPU too, only slower."""
    used: list[int] = []
    torch_s = F.grouped_mm

    def grouped_mm(*args: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        used.append(len(offs))
        return torch_s(*args, offs=offs)

    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 16), (8, 48, 16), (8, 16, 24), (40, 3)]
    first = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    ids = torch.rand(40, 8, generator=generator).argsort(-1)[:, :3]
    ids[ids == 5] = 6  # an expert without tokens
    results = []
    for kernel in (True, False):
        with monkeypatch.context() as patched:
            for name in ("expert products", "expert gradients"):
                operation = kernels.TABLE[name]
                theirs = Kernel(operation.kernels["cuda"]["grouped_mm"].run)  # in any number type
                patched.setitem(operation.kernels["cpu"], "grouped_mm", theirs)
                patched.setattr(operation, "order", {"cpu": ["grouped_mm"] if kernel else []})
            patched.setattr("qwen2.model.kernels.F.grouped_mm", grouped_mm)
            inputs = [t.clone().requires_grad_() for t in first]
            y = grouped_experts(*inputs[:3], ids, inputs[3])
            y.square().sum().backward()
        results.append([y, *(t.grad for t in inputs)])
    assert used == [8] * 6, "two products forward, four back"
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours)


@torch.no_grad()
@pytest.mark.parametrize("way", ["dca+yarn", "yarn"])
def test_mixtures_extend_their_context_like_any_model(mixture: ModelConfig, way: str) -> None:
    """Prefill and decode over several chunks equal one pass."""
    short = mixture.model_copy(update={"max_position_embeddings": 16})
    model = extended(build(short), 128, way)
    tokens = tokens_of(mixture, 70)
    store = KVStore(model.config, 70, torch.float32, CPU)
    parts, end = [], 0
    for chunk in tokens.split([37, 20, *[1] * 13]):
        end += len(chunk)
        context = model.cached(store, [torch.arange(end)], [len(chunk)])
        parts.append(model(chunk, context.positions(CPU), context))
    whole = model(tokens, torch.arange(70), model.packed([70]))
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_threads_of_their_own_change_no_value(
    mode: type, mixture: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads, enough in ((1, 1 << 29), (3, 0)):
            torch.set_num_threads(threads)
            monkeypatch.setattr("qwen2.model.experts.ENOUGH", enough)
            with mode():
                model = build(mixture)
                out = alone(model, tokens_of(mixture, 40))
            if mode is torch.enable_grad:
                out.square().mean().backward()
            results.append([out, *(p.grad for p in model.parameters() if p.grad is not None)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(results[0]) == (
        1 + len(list(model.parameters())) if mode is torch.enable_grad else 1
    )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_experts_without_tokens_are_not_touched() -> None:
    """One token, two experts of 32: those in between hold what would spoil any sum."""
    gate_up, down = torch.full((32, 4, 8), math.nan), torch.full((32, 8, 2), math.nan)
    gate_up[[3, 17]], down[[3, 17]] = 0.5, 2.0
    ids, weights = torch.tensor([[17, 3]]), torch.tensor([[0.25, 0.5]])
    y = grouped_experts(torch.ones(1, 8), gate_up, down, ids, weights)
    # gate = up = 4; silu(4)·4·2 over two units, times 3/4
    expected = 0.75 * 4 * 2 * 2 * 4 / (1 + math.exp(-4))
    torch.testing.assert_close(y, torch.full((1, 8), expected))


@torch.no_grad()
def test_cache_equals_no_cache(mixture: ModelConfig) -> None:
    model = build(mixture)
    tokens = tokens_of(mixture, 20)
    store = KVStore(mixture, 20, torch.float32, CPU)
    parts, end = [], 0
    for chunk in tokens.split([9, 1, 1, 6, 1, 1, 1]):
        end += len(chunk)
        attention = model.cached(store, [torch.arange(end)], [len(chunk)])
        parts.append(model(chunk, attention.positions(CPU), attention))
    torch.testing.assert_close(torch.cat(parts), alone(model, tokens), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_fused_projections_change_no_value(mixture: ModelConfig) -> None:
    model = build(mixture)
    tokens = tokens_of(mixture, 20)
    before = alone(model, tokens)
    model.fuse_projections()
    shared = model.model.layers[0].mlp.shared_expert
    assert shared is not None
    assert shared.projections.fused
    torch.testing.assert_close(alone(model, tokens), before, atol=1e-6, rtol=1e-6)


def test_the_router_computes_in_fp32() -> None:
    """Two logits that bf16 cannot tell apart: 1 and 1 + 2^-10, as a sum of two products."""
    x = torch.tensor([[1.0, 2**-10]], dtype=torch.bfloat16)
    weight = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.bfloat16)
    logits = router_logits(x, weight)
    assert logits.dtype == torch.float32
    assert (logits[0, 1] - logits[0, 0]).item() == 2**-10
    assert (F.linear(x, weight)[0, 1] - F.linear(x, weight)[0, 0]).item() == 0
    moe = Mixture(
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=1,
        shared_expert_intermediate_size=0,
    )
    probabilities, ids, weights = route(logits, moe)
    assert torch.equal(probabilities, (x.float() @ weight.float().T).softmax(-1))
    assert ids.item() == 1
    assert weights.item() == pytest.approx(0.5 + 2**-12, abs=1e-6)


def test_a_bf16_model_routes_by_fp32_probabilities(mixture: ModelConfig) -> None:
    layer = build(mixture).to(torch.bfloat16).model.layers[0].mlp
    x = torch.randn(50, mixture.hidden_size, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert mixture.moe is not None
    routing = Routing(mixture.moe, CPU)
    layer(x, routing)
    exact = F.linear(x.float(), layer.gate.weight.float()).softmax(-1)
    torch.testing.assert_close(routing.probabilities, exact.sum(0), atol=0, rtol=0)


def filled(logits: torch.Tensor, k: int) -> Routing:
    """The statistics of one layer with these logits (N, E)."""
    moe = Mixture(
        num_experts=logits.shape[1],
        num_experts_per_tok=k,
        moe_intermediate_size=1,
        shared_expert_intermediate_size=0,
    )
    routing = Routing(moe, CPU)
    probabilities, ids, _ = route(logits, moe)
    routing.add(logits, probabilities, ids)
    return routing


def test_uniform_routing_has_a_balance_loss_of_k() -> None:
    """Each of 64 tokens prefers 8 experts of its own by next to nothing, each expert 8 times."""
    logits = torch.zeros(64, 64, dtype=torch.float64)
    for token in range(64):
        logits[token, [(token + i) % 64 for i in range(8)]] = 1e-9
    routing = filled(logits, k=8)
    assert routing.counts.tolist() == [8] * 64
    assert routing.balance_loss().item() == pytest.approx(8.0, abs=1e-6)
    assert expert_entropy(routing.counts) == 1.0


def test_the_balance_loss_of_a_collapsed_router() -> None:
    """All tokens go to expert 0 with p = 3/4 and to expert 1 with 1/4: 2 (1·3/4 + 0·1/4)."""
    routing = filled(torch.tensor([[math.log(3), 0.0]]).repeat(5, 1), k=1)
    assert routing.balance_loss().item() == pytest.approx(1.5)
    assert expert_share(routing.counts).tolist() == [1.0, 0.0]
    assert expert_entropy(routing.counts) == 0.0
    assert routing.dropped() == 0


def test_the_z_loss_by_hand() -> None:
    """logsumexp of (0, 0) is ln 2, of (ln 3, 0) ln 4."""
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]])
    expected = (math.log(2) ** 2 + math.log(4) ** 2) / 2
    assert filled(logits, k=1).z_loss().item() == pytest.approx(expected)


def test_the_entropy_by_hand() -> None:
    """Shares 1/2, 1/4, 1/4: 3/2 ln 2 over ln 3."""
    expected = 1.5 * math.log(2) / math.log(3)
    assert expert_entropy(torch.tensor([2, 1, 1])) == pytest.approx(expected)
    assert expert_entropy(torch.tensor([7])) == 1.0


@given(N=st.integers(1, 30), E=st.integers(1, 12), layers=st.integers(1, 3), data=st.data())
@settings(max_examples=40)
def test_statistics_equal_transformers(N: int, E: int, layers: int, data: st.DataObject) -> None:
    k, seed = data.draw(st.integers(1, E)), data.draw(st.integers(0, 999))
    logits = torch.randn(layers, N, E, generator=torch.Generator().manual_seed(seed)) * 2
    moe = Mixture(
        num_experts=E,
        num_experts_per_tok=k,
        moe_intermediate_size=1,
        shared_expert_intermediate_size=0,
    )
    routing = Routing(moe, CPU)
    for layer in logits:
        probabilities, ids, _ = route(layer, moe)
        routing.add(layer, probabilities, ids)
    theirs = load_balancing_loss_func(tuple(logits), E, k)
    assert routing.balance_loss().item() == pytest.approx(float(theirs), rel=1e-4)
    assert routing.tokens == layers * N
    assert int(routing.counts.sum()) == routing.pairs == layers * N * k
    assert expert_share(routing.counts).sum().item() == pytest.approx(1.0)
    assert 0 <= expert_entropy(routing.counts) <= 1
    assert routing.dropped() == 0


def test_statistics_of_all_layers_change_no_value(mixture: ModelConfig) -> None:
    model = build(mixture)
    tokens = tokens_of(mixture, 30)
    routing = routing_of(model, tokens)
    assert routing.tokens == 30 * mixture.num_hidden_layers
    assert routing.pairs == 3 * routing.tokens
    assert routing.probabilities.sum().item() == pytest.approx(routing.tokens, rel=1e-5)
    again = routing_of(model, tokens)
    assert torch.equal(routing.counts, again.counts)


def test_initial_experts_have_the_range_of_other_matrices(mixture: ModelConfig) -> None:
    model = Qwen2(mixture)
    init_weights(model, torch.Generator().manual_seed(0))
    for stack in (model.model.layers[0].mlp.experts.gate_up_proj, model.lm_head.weight):
        assert stack.std().item() == pytest.approx(mixture.initializer_range, rel=0.05)
        assert abs(stack.mean().item()) < 0.002
