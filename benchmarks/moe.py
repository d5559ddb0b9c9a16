"""Speed of one mixture-of-experts layer: ours against transformers' Qwen2MoeSparseMoeBlock.

64 routed experts of which 8, and shared ones, with the same weights and the same tokens on both
sides, forward and forward with backward. The peers are transformers' loop over the experts (eager)
and its grouped products (`experts_implementation="grouped_mm"`). Outputs and gradients are compared
before anything is timed: in bf16, where transformers' router rounds its logits, with the experts
that ours chose for both.

    python benchmarks/moe.py [--json] [--out FOLDER] [--rounds 5]
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

# The harness imports qwen2, which sets OMP_WAIT_POLICY: before torch.
from harness import alternate, finish, options, ratios, spread

EXPERTS, ACTIVE, WIDTH, INTERMEDIATE, SHARED = 64, 8, 512, 256, 512
TOKENS = (256, 1024, 4096)
PEERS = ("eager", "grouped_mm")


def measure(rounds: int) -> dict[str, Any]:
    """Milliseconds of each side and ratios, by number type and number of tokens."""
    import torch

    from qwen2.common.runtime import keep_freed_memory

    keep_freed_memory()  # for both sides, which share the process
    figures: dict[str, Any] = {
        "experts": EXPERTS,
        "experts_per_token": ACTIVE,
        "hidden_size": WIDTH,
        "expert_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": SHARED,
    }
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        for count in (1, *TOKENS):
            figures[f"{name}_{count}"] = compare(dtype, count, rounds)
    return figures


def compare(dtype: Any, count: int, rounds: int) -> dict[str, Any]:
    """One number type and number of tokens."""
    import torch

    ours, theirs = layers(dtype)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, WIDTH, generator=generator).to(dtype).requires_grad_()
    dy = torch.randn(count, WIDTH, generator=generator).to(dtype)
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: ours(x)}
    for peer in PEERS:
        sides[peer] = lambda peer=peer: run_peer(theirs, peer, x)

    figures: dict[str, Any] = {
        "relative_differences": {p: differences(ours, theirs, p, x, dy) for p in PEERS}
    }

    def forward(side: Callable[[], Any]) -> float:
        began = time.perf_counter()
        with torch.no_grad():
            side()
        return time.perf_counter() - began

    def both(side: Callable[[], Any]) -> float:
        for parameter in (x, *ours.parameters(), *theirs.parameters()):
            parameter.grad = None
        began = time.perf_counter()
        side().backward(dy)
        return time.perf_counter() - began

    repeats = 1 if count > 1 else 20  # a token alone takes less than a millisecond
    passes = {"forward": forward} | ({"training": both} if count > 1 else {})
    for kind, clock in passes.items():
        runs = {
            name: lambda side=side, clock=clock: sum(clock(side) for _ in range(repeats)) / repeats
            for name, side in sides.items()
        }
        seconds = alternate(runs, rounds)
        for name, values in seconds.items():
            figures[f"{kind}_{name}_ms"] = spread(1000 * value for value in values)
        for peer in PEERS:
            figures[f"{kind}_{peer}_ratio"] = ratios(seconds[peer], seconds["ours"])
    return figures


def layers(dtype: Any) -> tuple[Any, Any]:
    """Our layer and transformers', with the same random weights."""
    import torch
    import transformers
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

    from qwen2.model.config import Mixture, ModelConfig
    from qwen2.model.moe import MoE

    sizes = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": ACTIVE,
        "moe_intermediate_size": INTERMEDIATE,
        "shared_expert_intermediate_size": SHARED,
    }
    config = ModelConfig(
        vocab_size=1,
        hidden_size=WIDTH,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=8,
        moe=Mixture(**sizes),
    )
    torch.manual_seed(0)
    ours = MoE(config).to(dtype)
    theirs = Qwen2MoeSparseMoeBlock(transformers.Qwen2MoeConfig(hidden_size=WIDTH, **sizes))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.to(dtype)


def run_peer(theirs: Any, implementation: str, x: Any) -> Any:
    """transformers' layer by one of its ways."""
    theirs.experts.config._experts_implementation = implementation
    return theirs(x[None])[0]


def differences(ours: Any, theirs: Any, peer: str, x: Any, dy: Any) -> dict[str, float]:
    """Norm of the difference over the norm, of the output and of the experts' gradients."""
    import torch

    chosen: list[Any] = []
    hook = ours.experts.register_forward_pre_hook(
        lambda _, args: chosen.extend(a.detach() for a in args[1:])
    )
    same = theirs.gate.register_forward_hook(lambda *_: (None, chosen[1], chosen[0]))
    results = []
    for side, run in ((ours, lambda: ours(x)), (theirs, lambda: run_peer(theirs, peer, x))):
        side.zero_grad()
        y = run()
        y.backward(dy)
        stacks = side.experts.gate_up_proj.grad, side.experts.down_proj.grad
        results.append([t.detach().float().clone() for t in (y, *stacks)])
    hook.remove()
    same.remove()
    apart = [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    limit = 1e-5 if x.dtype == torch.float32 else 2e-2
    if max(apart) > limit:
        raise SystemExit(f"the two layers differ by {apart}, more than {limit}")
    return dict(zip(("output", "gate_up_gradient", "down_gradient"), apart, strict=True))


def main() -> None:
    """Measure and print."""
    chosen = options(__doc__.partition("\n")[0]).parse_args()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    finish("moe", measure(chosen.rounds), chosen)


if __name__ == "__main__":
    main()
