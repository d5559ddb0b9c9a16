"""A training step over many ranks: how a model and its loss are divided among them.

Layers are divided over pp (pipeline_parallel.py), matrices over tp (tensor_parallel.py), routed
experts over ep (expert_parallel.py), tokens over cp (ulysses.py). What is left of the weights is
sharded by FSDP2 (`fully_shard`; ZeRO stage 3, Rajbhandari et al. 2020) over the ranks of dp_shard
and cp, gathered in the compute dtype when it is used, and replicated over dp_replicate (HSDP). Each
layer is a unit of its own, and so are its routed experts, whose ranks are others: those of tp too,
which have tokens of their own. The embedding, the final norm and the head are the root's. Gradients
are summed in fp32, not averaged: the loss is divided by the number of the targets of all ranks
already.

The model knows nothing of it, and its parameters keep their names; their values are DTensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn import Parameter

from qwen2.model.decoder import Qwen2
from qwen2.model.moe import Experts
from qwen2.train.expert_parallel import divide_experts
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.pipeline_parallel import PipelineLoss, keep_stage
from qwen2.train.tensor_parallel import divide_matrices
from qwen2.train.world import World


def parallelise(
    model: Qwen2, world: World, dtype: torch.dtype, reshard_after_forward: bool = True
) -> PackedLoss:
    """`model`, which is divided among the ranks of `world` in place, with its loss.

    Args:
        model: in fp32, with the same weights on all ranks, on the world's device.
        dtype: what is computed in; the sharded weights stay in fp32, for the optimizer.
        reshard_after_forward: free a layer's gathered weights until it goes back, and gather them
            again; without, a step is faster and needs the memory of all weights in `dtype`.

    Returns:
        What gives the loss of a batch: each rank that of its share, which add up over
        `world.sum(..., "data")`. Their gradients are those of the sum on all ranks.
    """
    if not world.views:
        return PackedLoss(model)
    if world.mesh.tp > 1:
        divide_matrices(model, world.views["dense"]["tp"])
    if world.mesh.pp > 1:
        keep_stage(model, world)
    if world.mesh.ep > 1:
        for experts in _experts(model):
            divide_experts(experts, world.views["sparse"]["ep"])
    loss = PipelineLoss(model, world, dtype) if world.mesh.pp > 1 else PackedLoss(model, world)
    _shard(loss, world, dtype, reshard_after_forward)
    return loss


def _experts(model: Qwen2) -> Iterator[Experts]:
    """The routed experts of each layer of a mixture."""
    return (module for module in model.modules() if isinstance(module, Experts))


def _shard(loss: PackedLoss, world: World, dtype: torch.dtype, reshard: bool) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    replicated = ("dp_replicate",) if world.mesh.dp_replicate > 1 else ()
    dense = world.views["dense"][(*replicated, "fsdp")]
    sparse = world.views["sparse"][(*replicated, "efsdp")]
    ranks = sparse.size(-1)
    for experts in _experts(loss.model):
        fully_shard(
            experts,
            mesh=sparse,
            mp_policy=policy,
            reshard_after_forward=reshard,
            shard_placement_fn=lambda parameter: _expert_placement(parameter, ranks),
        )
    for layer in loss.model.model.layers:
        fully_shard(layer, mesh=dense, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(loss, mesh=dense, mp_policy=policy)
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A division within the collective is NCCL's alone, and there is none to do.
            module.set_force_sum_reduction_for_comms(True)


def _expert_placement(stack: Parameter, ranks: int) -> Shard:
    """Whole experts to each of `ranks`; where they do not come out even, rows of all of them."""
    local = stack.to_local() if isinstance(stack, DTensor) else stack
    uneven = local.shape[0] % ranks and not local.shape[1] % ranks
    return Shard(1 if uneven else 0)
