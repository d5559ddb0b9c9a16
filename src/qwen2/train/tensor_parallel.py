"""Tensor parallelism (Shoeybi et al. 2019) with sequence parallelism (Korthikanti et al. 2022).

    between layers      each of the tp ranks has N/tp of the tokens, neighbours: residuals, norms,
                        and all of a mixture's feed-forward but its routed experts, see below
    attention, MLP      the tokens are gathered; q, k, v, gate and up give a share of the heads or
                        of the intermediate units, o and down sums of shares, which are added up
                        and scattered
    embedding, head     a share of the vocabulary each; the loss gathers no logits (loss.py)

Whoever looks at tokens one by one has the same weights on all ranks, whose gradients are summed.
Deviation: a mixture's feed-forward is such a one. Its routed experts are divided over all ranks of
fsdp and tp alike, by FSDP and ep, so there is nothing to gain from cutting narrow ones up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)

from qwen2.model.decoder import Qwen2, RMSNorm
from qwen2.model.moe import Experts, MoE
from qwen2.train.loss import VocabularyShare


class TokenByToken(ParallelStyle):
    """A module that each rank applies to tokens of its own; routed experts in it are left alone."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        owners = [part for part in module.modules() if not isinstance(part, Experts)]
        for owner in owners:
            for name, parameter in list(owner.named_parameters(recurse=False)):
                same = distribute_tensor(parameter, device_mesh, [Replicate()])
                owner.register_parameter(name, nn.Parameter(same))
        inner = module.forward

        def forward(*args: Any) -> Any:
            with _local(owners):
                return inner(*args)

        module.forward = forward
        return module


@contextmanager
def _local(owners: list[nn.Module]) -> Iterator[None]:
    """Plain tensors in place of the parameters of `owners`; their gradients are parts of sums."""
    parameters = [(owner, dict(owner.named_parameters(recurse=False))) for owner in owners]
    try:
        for owner, own in parameters:
            for name, parameter in own.items():
                assert isinstance(parameter, DTensor)
                local: Any = parameter.to_local(grad_placements=[Partial()])
                owner._parameters[name] = local
        yield
    finally:
        for owner, own in parameters:
            owner._parameters.update(own)


def divide_matrices(model: Qwen2, mesh: DeviceMesh) -> None:
    """Keep of `model` this rank's share over `mesh`, of one dimension."""
    plan: dict[str, ParallelStyle] = {
        # (n,) ids -> (n/tp, C); the table is a share of the vocabulary
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0)),
        # Whole logits, for whoever evaluates; the loss takes the weight alone.
        "lm_head": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
    }
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm | MoE):
            plan[name] = TokenByToken()
    for number, layer in enumerate(model.model.layers):
        attention, mlp = (f"model.layers.{number}.{part}" for part in ("self_attn", "mlp"))
        plan[attention] = PrepareModuleInput(
            input_layouts=(Shard(0), None, None), desired_input_layouts=(Replicate(), None, None)
        )
        for projection in ("q_proj", "k_proj", "v_proj"):
            plan[f"{attention}.{projection}"] = ColwiseParallel()
        plan[f"{attention}.o_proj"] = RowwiseParallel(output_layouts=Shard(0))
        if isinstance(layer.mlp, MoE):
            continue
        plan[mlp] = PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate())
        for projection in ("gate_proj", "up_proj"):
            # As DTensors, which know the whole size where shares differ by one.
            plan[f"{mlp}.{projection}"] = ColwiseParallel(use_local_output=False)
        plan[f"{mlp}.down_proj"] = RowwiseParallel(output_layouts=Shard(0))
    parallelize_module(model, mesh, plan)
    model.tie_weights()


def gather_tokens(hidden: Tensor, mesh: DeviceMesh) -> Tensor:
    """hidden (n/tp, C) of each rank -> (n, C) on all; the gradients of all ranks are summed."""
    whole = DTensor.from_local(hidden, mesh, [Shard(0)], run_check=False)
    return whole.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def vocabulary_share(weight: Tensor) -> tuple[Tensor, VocabularyShare]:
    """The rows of the head's weight that are here, and which those are."""
    assert isinstance(weight, DTensor)
    group = weight.device_mesh.get_group()
    width = -(-weight.shape[0] // group.size())  # as torch.chunk has it
    share = VocabularyShare(group, min(width * group.rank(), weight.shape[0]), width)
    return weight.to_local(grad_placements=[Shard(0)]), share
