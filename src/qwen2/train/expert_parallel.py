"""Expert parallelism: routed experts divided among ranks, and tokens sent to where theirs are
(GShard, Lepikhin et al. 2020), without a capacity: nothing is dropped, nothing is padded.

Rank r of `ep` keeps experts r·E/ep to (r + 1)·E/ep of each layer. Every rank routes its own tokens,
sends the M = n·k pairs of token and expert to the ranks of the experts, computes what it is sent,
and sends it back; the sizes go first. Weights are applied at home.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import Parameter

from qwen2.model.experts import grouped_experts
from qwen2.model.moe import Experts


def divide_experts(experts: Experts, mesh: DeviceMesh) -> None:
    """Keep of `experts` this rank's share over `mesh`, of one dimension, and let tokens travel."""
    for name, parameter in list(experts.named_parameters()):
        experts.register_parameter(name, Parameter(distribute_tensor(parameter, mesh, [Shard(0)])))
    group = mesh.get_group()

    def forward(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        gate_up, down = experts.gate_up_proj, experts.down_proj
        assert isinstance(gate_up, DTensor)
        assert isinstance(down, DTensor)
        return travelling_experts(x, gate_up.to_local(), down.to_local(), ids, weights, group)

    experts.forward = forward  # type: ignore[method-assign]


def travelling_experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    group: dist.ProcessGroup,
) -> Tensor:
    """`grouped_experts` of this rank's n tokens by the experts of all ranks of `group`.

    x (n, C); gate_up (E/ep, 2I, C) and down (E/ep, C, I), the experts here; ids, of 0..E, and
    weights (n, k) -> (n, C).
    """
    (n, k), ep, E = ids.shape, group.size(), len(gate_up) * group.size()
    order = ids.flatten().argsort(stable=True)  # (M,), pairs by expert, and so by rank
    sent = torch.bincount(ids.flatten(), minlength=E).view(ep, -1)  # (ep, E/ep)
    received = torch.empty_like(sent)  # by sender, for each expert here
    dist.all_to_all_single(received, sent, group=group)
    there, here = sent.sum(1).tolist(), received.sum(1).tolist()
    rows = _exchange(x.index_select(0, order // k), here, there, group)  # (R, C)
    expert = torch.arange(len(gate_up), device=x.device).repeat(ep)
    expert = expert.repeat_interleave(received.flatten())[:, None]  # (R, 1)
    out = grouped_experts(rows, gate_up, down, expert, rows.new_ones(len(rows), 1))
    out = _exchange(out, there, here, group)  # (M, C), in the order of `order`
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    out = out.index_select(0, back).unflatten(0, (n, k))
    # A copy, for FSDP warns of views: in-place changes of them would pass its hooks by.
    return torch.bmm(weights[:, None], out)[:, 0].clone()


def _exchange(rows: Tensor, here: list[int], there: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send `there[r]` of the rows to each rank r, and receive `here[r]` from it."""
    return wait_tensor(all_to_all_single_autograd(rows, here, there, group))
