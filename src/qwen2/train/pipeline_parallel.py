"""Pipeline parallelism: layers divided into stages, and a step's micro-batches sent through them by
1F1B (Narayanan et al. 2021), which is that of torch.distributed.pipelining.

Stage s of `pp` keeps `stage_layers(L, pp)[s]` layers, the first also the embedding, the last the
final norm and the head. Every stage reads the same rows, so that hidden states alone travel, of
the same shape for every micro-batch: (n, C) of this rank's n = N / (cp·tp) tokens. How documents
lie in them each stage knows by itself. The loss is the last stage's, divided by the number of all
targets; gradients of micro-batches add up, and FSDP reduces them after each.

A mixture's balance loss is E · Σ_e f_e P_e of all layers together (moe.py), which are in several
stages. So what routers did so far, three sums over layers, travels with the hidden states; the last
stage computes the loss of all, and the gradients of the sums come back with those of the hidden
states. Counts of pairs travel as fp32, which is exact up to 2^24 of an expert in a micro-batch of a
rank.

torch receives each of the M micro-batches of a step into memory of its own: M·n·C numbers from the
stage before and as many from the one after stand from the beginning of the step to its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from qwen2.model.decoder import Qwen2
from qwen2.model.moe import Routing
from qwen2.tokens.packing import PackedBatch
from qwen2.train.loss import OutputZ
from qwen2.train.packed_loss import PackedLoss
from qwen2.train.plan_parameters import stage_layers
from qwen2.train.router import RouterLosses
from qwen2.train.world import World


def keep_stage(model: Qwen2, world: World) -> None:
    """Leave of `model` what is of this rank's stage, under the names that it has in the whole."""
    decoder = model.model
    own = _layers_of(model, world)
    layers = nn.ModuleList()
    for number, layer in enumerate(decoder.layers):
        if number in own:
            layers.add_module(str(number), layer)
    decoder.layers = layers
    if not world.is_first_stage:
        del decoder.embed_tokens
    if not world.is_last_stage:
        del decoder.norm, model.lm_head


def _layers_of(model: Qwen2, world: World) -> range:
    """Numbers of the layers of this rank's stage."""
    ends = list(accumulate(stage_layers(model.config.num_hidden_layers, world.mesh.pp), initial=0))
    return range(ends[world.stage], ends[world.stage + 1])


class PipelineLoss(PackedLoss):
    """A stage of a model, see `keep_stage`, computed in `dtype`, and its part of the loss.

    That of the last stage is the loss; others have none of it.
    """

    def __init__(self, model: Qwen2, world: World, dtype: torch.dtype) -> None:
        super().__init__(model, world)
        self.dtype = dtype
        self.group = world.views["rows"].get_group("pp")

    def backward(
        self,
        batches: Sequence[PackedBatch],
        count: int,
        routers: RouterLosses | None = None,
        z: OutputZ | None = None,
        collect: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """As `PackedLoss.backward`, but `collect` is called once: gradients are those of all.

        What is in `routers` and `z` thereafter is of all stages in the last one.
        """
        assert len(batches) >= self.world.mesh.pp, "Stretch.shared gives each stage one"
        assert count, "all stages but the last would wait for its gradients"
        step = _Step(self, batches, count, routers, z)
        between = step.between()
        stage = PipelineStage(
            _Module(step.run),
            self.world.stage,
            self.world.mesh.pp,
            self.world.device,
            input_args=() if self.world.is_first_stage else between,
            output_args=torch.empty(()) if self.world.is_last_stage else between,
            group=self.group,
        )
        numbers = torch.arange(len(batches))
        schedule = Schedule1F1B(stage, len(batches), lambda loss, _: loss, scale_grads=False)
        schedule.step(number=numbers, target=numbers, return_outputs=False)
        collect()
        return step.total

    def forward(
        self,
        batch: PackedBatch,
        count: int | None = None,
        routing: Routing | None = None,
        z: OutputZ | None = None,
        received: Tensor | None = None,
    ) -> Tensor:
        """This rank's part of a batch's loss, as `PackedLoss.forward` has it; without gradients.

        All stages must be given the batch. With gradients, in `backward`, it is the pass of the
        stage alone: from `received`, hidden states (n, C) of the stage before, to its own; in the
        last one to the loss.
        """
        own, attention = self._own_part(batch)
        decoder = self.model.model
        if self.world.is_first_stage:
            x = decoder.embed_tokens(own.tokens)
        else:
            x = self._receive(batch) if received is None else received
        x = decoder.run_layers(x, own.positions, attention, routing)
        if self.world.is_last_stage:
            return self._cross_entropy(decoder.norm(x), own.targets, count, routing, z)
        if not torch.is_grad_enabled():
            dist.send(x.contiguous(), group=self.group, group_dst=self.world.stage + 1)
            return x.new_zeros((), dtype=torch.promote_types(self.dtype, torch.float32))
        return x

    def between(self, batch: PackedBatch) -> Tensor:
        """Room for the hidden states (n, C) of a batch on their way to this stage, or from it."""
        mesh, C = self.world.mesh, self.model.config.hidden_size
        n = len(batch.tokens) // (mesh.cp * mesh.tp)
        return torch.empty(n, C, dtype=self.dtype, device=self.world.device)

    def _receive(self, batch: PackedBatch) -> Tensor:
        x = self.between(batch)
        dist.recv(x, group=self.group, group_src=self.world.stage - 1)
        return x


class _Step:
    """The micro-batches of a step, each of which passes this stage once."""

    def __init__(
        self,
        loss: PipelineLoss,
        batches: Sequence[PackedBatch],
        count: int,
        routers: RouterLosses | None,
        z: OutputZ | None,
    ) -> None:
        self.loss, self.batches, self.count, self.routers, self.z = loss, batches, count, routers, z
        self.total = torch.zeros((), dtype=torch.float64, device=loss.world.device)
        """Of the losses so far; zero but in the last stage."""

    def between(self) -> tuple[Tensor, ...]:
        """Room for what stages send each other of a micro-batch, all with gradients."""
        found = [self.loss.between(self.batches[0])]
        if self.routers:
            sums = 2 * self.routers.moe.num_experts + 1
            found.append(torch.empty(sums, device=self.loss.world.device))
        return tuple(tensor.requires_grad_() for tensor in found)

    def run(
        self, number: int, received: Tensor | None = None, routed: Tensor | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """What the next stage is sent of micro-batch `number`; in the last one, the loss to lower.

        received: hidden states of the stage before, and `routed`, see `_pack`; None in the first.
        """
        batch, routing = self.batches[number], None
        if self.routers:
            routing = Routing(self.routers.moe, self.loss.world.device)
            if received is not None and routed is not None:
                layers = _layers_of(self.loss.model, self.loss.world).start
                chosen = self.routers.moe.num_experts_per_tok
                _unpack(routed, routing, layers * len(received), chosen)
        out: Tensor = self.loss(batch, self.count, routing, self.z, received)
        if not self.loss.world.is_last_stage:
            return (out, _pack(routing)) if routing else out
        self.total += out.detach()
        if self.routers and routing:
            out = out + self.routers.add(routing, len(batch.tokens))
        return out


class _Module(nn.Module):
    """What the schedule takes for the stage: a function, without the parameters behind it.

    If it saw them, it would drop gradients that are there, and reduce those of FSDP itself, at the
    end of the step: every weight of a stage would have to stay gathered until then.
    """

    def __init__(self, run: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.run = run

    def forward(self, *received: Tensor, number: Tensor) -> Tensor | tuple[Tensor, ...]:
        """`number`: (1,), on the CPU."""
        return self.run(int(number), *received)


def _pack(routing: Routing) -> Tensor:
    """The sums of `routing` over the layers so far, (2E + 1,) in fp32."""
    sums = routing.counts.float(), routing.probabilities, routing.square_logsumexp[None]
    return torch.cat(sums)


def _unpack(sums: Tensor, routing: Routing, tokens: int, chosen: int) -> None:
    """Begin `routing`, which is new, with those that `_pack` gives, of `tokens` tokens.

    A token counts once in each layer; `chosen`: experts of each.
    """
    E = len(routing.counts)
    counts, routing.probabilities, square = sums.split([E, E, 1])
    routing.counts = counts.detach().round().long()
    routing.square_logsumexp = square[0]
    routing.tokens, routing.pairs = tokens, tokens * chosen
