"""A training step over many ranks: how a model and its loss are divided among them.

Weights are sharded by FSDP2 (`fully_shard`; ZeRO stage 3, Rajbhandari et al. 2020) over the ranks
of dp_shard and cp, gathered in the compute dtype when they are used, and replicated over
dp_replicate (HSDP). Each layer is a unit of its own; the embedding, the final norm and the head
are the root's. Gradients are summed in fp32, not averaged: the loss is divided by the number of the
targets of all ranks already.

The model knows nothing of it, and its parameters keep their names; their values are DTensors.
"""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from qwen2.model.decoder import Qwen2
from qwen2.train.packed_loss import PackedLoss
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
    context = world.views["rows"].get_group("cp") if world.mesh.cp > 1 else None
    loss = PackedLoss(model, context)
    _shard(loss, world, dtype, reshard_after_forward)
    return loss


def _shard(loss: PackedLoss, world: World, dtype: torch.dtype, reshard: bool) -> None:
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    replicated = ("dp_replicate",) if world.mesh.dp_replicate > 1 else ()
    dense = world.views["dense"][(*replicated, "fsdp")]
    for layer in loss.model.model.layers:
        fully_shard(layer, mesh=dense, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(loss, mesh=dense, mp_policy=policy)
    for module in loss.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A division within the collective is NCCL's alone, and there is none to do.
            module.set_force_sum_reduction_for_comms(True)
