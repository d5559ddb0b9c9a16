"""How many parameters a rank keeps and gathers, in closed form, weight by weight.

As parallelise.py divides them: tp cuts matrices by rows or columns and the vocabulary by rows, and
leaves norms and all of a mixture's feed-forward whole; ep gives each rank some of the routed
experts; FSDP then cuts what a rank has by rows, as torch.chunk does. Shares that do not come out
even are rounded up: the first rank of a group has the most of everything, and it is the one that is
counted. Held against the sharded model itself by tests (dry_run.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from qwen2.model.config import ModelConfig
from qwen2.train.mesh import Mesh


@dataclass(frozen=True)
class Weight:
    """`rows` x `width` numbers, and which of the two tp divides."""

    rows: int
    width: int = 1
    cut: Literal["rows", "width", "none"] = "rows"

    @property
    def total(self) -> int:
        """Numbers."""
        return self.rows * self.width

    def gathered(self, mesh: Mesh) -> int:
        """Of one rank while FSDP has it together."""
        rows, width = self._divided(mesh.tp)
        return rows * width

    def kept(self, mesh: Mesh) -> int:
        """Of one rank between."""
        rows, width = self._divided(mesh.tp)
        return share(rows, mesh.fsdp) * width

    def _divided(self, tp: int) -> tuple[int, int]:
        if self.cut == "rows":
            return share(self.rows, tp), self.width
        return self.rows, share(self.width, tp) if self.cut == "width" else self.width


@dataclass(frozen=True)
class Stack:
    """A matrix of each routed expert."""

    experts: int
    rows: int
    width: int

    @property
    def total(self) -> int:
        """Numbers."""
        return self.experts * self.rows * self.width

    def gathered(self, mesh: Mesh) -> int:
        """Of one rank while FSDP has its experts together."""
        return self.total // mesh.ep

    def kept(self, mesh: Mesh) -> int:
        """Of one rank between: whole experts, or where those do not come out even, rows of all."""
        own, ranks = self.experts // mesh.ep, mesh.fsdp * mesh.tp // mesh.ep
        if own % ranks and self.rows % ranks == 0:
            return own * self.rows // ranks * self.width
        return share(own, ranks) * self.rows * self.width


@dataclass(frozen=True)
class Parameters:
    """Some weights, each so and so often."""

    counts: tuple[tuple[Weight | Stack, int], ...]

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.counts + other.counts)

    def __mul__(self, times: int) -> Parameters:
        return Parameters(tuple((weight, times * n) for weight, n in self.counts))

    @property
    def total(self) -> int:
        """All of them."""
        return sum(n * weight.total for weight, n in self.counts)

    def gathered(self, mesh: Mesh) -> int:
        """Of one rank while FSDP has them together."""
        return sum(n * weight.gathered(mesh) for weight, n in self.counts)

    def kept(self, mesh: Mesh) -> int:
        """Of one rank between."""
        return sum(n * weight.kept(mesh) for weight, n in self.counts)

    @cached_property
    def experts(self) -> Parameters:
        """Those of routed experts."""
        return Parameters(tuple((w, n) for w, n in self.counts if isinstance(w, Stack)))

    @cached_property
    def whole(self) -> Parameters:
        """Those that all ranks of tp have alike."""
        some = ((w, n) for w, n in self.counts if isinstance(w, Weight) and w.cut == "none")
        return Parameters(tuple(some))

    @cached_property
    def matrices(self) -> Parameters:
        """Those of two dimensions, experts' too."""
        some = ((w, n) for w, n in self.counts if min(w.rows, w.width) > 1)
        return Parameters(tuple(some))


@lru_cache
def layer_parameters(model: ModelConfig) -> Parameters:
    """Those of one layer."""
    C, KD, moe = model.hidden_size, model.kv_size, model.moe
    counts: list[tuple[Weight | Stack, int]] = [
        (Weight(C, C), 1), (Weight(C), 1),  # q and its bias
        (Weight(KD, C), 2), (Weight(KD), 2),  # k, v
        (Weight(C, C, "width"), 1),  # o
        (Weight(C, cut="none"), 2),  # norms
    ]  # fmt: skip
    if moe is None:
        width = model.intermediate_size
        counts += [(Weight(width, C), 2), (Weight(C, width, "width"), 1)]
        return Parameters(tuple(counts))
    E, I = moe.num_experts, moe.moe_intermediate_size  # noqa: E741
    counts += [(Weight(E, C, "none"), 1), (Stack(E, 2 * I, C), 1), (Stack(E, C, I), 1)]
    if width := moe.shared_expert_intermediate_size:
        counts += [(Weight(width, C, "none"), 2), (Weight(C, width, "none"), 1)]
        counts += [(Weight(1, C, "none"), 1)]  # its gate
    return Parameters(tuple(counts))


@lru_cache
def root_parameters(model: ModelConfig, first: bool = True, last: bool = True) -> Parameters:
    """The embedding, in the first stage, and norm and head, in the last; a tied head is none."""
    table, norm = Weight(model.vocab_size, model.hidden_size), Weight(model.hidden_size, cut="none")
    head = last and not model.tie_word_embeddings
    return Parameters(((table, first + head), (norm, int(last))))


def stage_layers(layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage: as even as can be, the first ones have one more."""
    return [layers // stages + (stage < layers % stages) for stage in range(stages)]


def stage_root(model: ModelConfig, mesh: Mesh, stage: int) -> Parameters:
    """What a pipeline stage has beside layers."""
    return root_parameters(model, first=stage == 0, last=stage == mesh.pp - 1)


def stage_parameters(model: ModelConfig, mesh: Mesh, stage: int) -> Parameters:
    """Those of a pipeline stage."""
    layers = stage_layers(model.num_hidden_layers, mesh.pp)[stage]
    return layer_parameters(model) * layers + stage_root(model, mesh, stage)


@dataclass(frozen=True)
class Shares:
    """Numbers that one rank of a pipeline stage has."""

    kept: int  # between
    kept_layer: int  # of that, a layer's
    layer: int  # of a layer, while FSDP has it together
    root: int  # of embedding, final norm and head, likewise
    dense: int  # of the whole stage, likewise, without routed experts
    experts: int  # of the routed experts of the whole stage, likewise
    whole: int  # of `dense`, what all ranks of tp have alike
    hidden: int  # of `kept`, the matrices of layers


@lru_cache(maxsize=1 << 14)
def stage_shares(model: ModelConfig, mesh: Mesh, stage: int) -> Shares:
    """The shares of the first rank of a stage, which has the most."""
    layer, root = layer_parameters(model), stage_root(model, mesh, stage)
    layers = stage_layers(model.num_hidden_layers, mesh.pp)[stage]
    gathered, root_gathered = layer.gathered(mesh), root.gathered(mesh)
    experts = layer.experts.gathered(mesh)
    return Shares(
        kept=layers * layer.kept(mesh) + root.kept(mesh),
        kept_layer=layer.kept(mesh),
        layer=gathered,
        root=root_gathered,
        dense=layers * (gathered - experts) + root_gathered,
        experts=layers * experts,
        hidden=layers * layer.matrices.kept(mesh),
        whole=layers * layer.whole.gathered(mesh) + root.whole.gathered(mesh),
    )


def share(amount: int, ranks: int) -> int:
    """The largest of `ranks` shares."""
    return -(-amount // ranks)
