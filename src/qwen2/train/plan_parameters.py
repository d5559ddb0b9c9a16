"""How many parameters a rank keeps and gathers, in closed form, weight by weight.

As parallelise.py divides them: tp cuts matrices by rows or columns and the vocabulary by rows, and
leaves norms and all of a mixture's feed-forward whole; ep gives each rank some of the routed
experts; FSDP then cuts what a rank has by rows, as torch.chunk does. Shares that do not come out
even are rounded up: the first rank of a group has the most of everything, and it is the one that is
counted. Held against the sharded model itself by tests (dry_run.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
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


class Parameters:
    """Some weights, each so and so often."""

    def __init__(self, *weights: Weight | Stack) -> None:
        self.counts = Counter(weights)

    def __add__(self, other: Parameters) -> Parameters:
        both = Parameters()
        both.counts = self.counts + other.counts
        return both

    def __mul__(self, times: int) -> Parameters:
        product = Parameters()
        product.counts = Counter({weight: times * n for weight, n in self.counts.items()})
        return product

    @property
    def total(self) -> int:
        """All of them."""
        return sum(n * weight.total for weight, n in self.counts.items())

    def gathered(self, mesh: Mesh) -> int:
        """Of one rank while FSDP has them together."""
        return sum(n * weight.gathered(mesh) for weight, n in self.counts.items())

    def kept(self, mesh: Mesh) -> int:
        """Of one rank between."""
        return sum(n * weight.kept(mesh) for weight, n in self.counts.items())

    @property
    def experts(self) -> Parameters:
        """Those of routed experts."""
        return self._only([w for w in self.counts if isinstance(w, Stack)])

    @property
    def whole(self) -> Parameters:
        """Those that all ranks of tp have alike."""
        return self._only([w for w in self.counts if isinstance(w, Weight) and w.cut == "none"])

    def _only(self, weights: list[Weight] | list[Stack]) -> Parameters:
        some = Parameters()
        some.counts = Counter({weight: self.counts[weight] for weight in weights})
        return some


def layer_parameters(model: ModelConfig) -> Parameters:
    """Those of one layer."""
    C, KD, moe = model.hidden_size, model.kv_size, model.moe
    attention = Parameters(
        Weight(C, C), Weight(C),  # q and its bias
        Weight(KD, C), Weight(KD), Weight(KD, C), Weight(KD),  # k, v
        Weight(C, C, "width"),  # o
        Weight(C, cut="none"), Weight(C, cut="none"),  # norms
    )  # fmt: skip
    if moe is None:
        width = model.intermediate_size
        return attention + Parameters(Weight(width, C), Weight(width, C), Weight(C, width, "width"))
    E, I = moe.num_experts, moe.moe_intermediate_size  # noqa: E741
    routed = Parameters(Weight(E, C, "none"), Stack(E, 2 * I, C), Stack(E, C, I))
    width = moe.shared_expert_intermediate_size
    if not width:
        return attention + routed
    up = Weight(width, C, "none")
    return attention + routed + Parameters(up, up, Weight(C, width, "none"), Weight(1, C, "none"))


def root_parameters(model: ModelConfig, first: bool = True, last: bool = True) -> Parameters:
    """The embedding, in the first stage, and norm and head, in the last; a tied head is none."""
    table = Parameters(Weight(model.vocab_size, model.hidden_size))
    head = last and not model.tie_word_embeddings
    norm = Parameters(*[Weight(model.hidden_size, cut="none")] * last)
    return table * (first + head) + norm


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
    layer: int  # of a layer, while FSDP has it together
    root: int  # of embedding, final norm and head, likewise
    dense: int  # of the whole stage, likewise, without routed experts
    experts: int  # of the routed experts of the whole stage, likewise
    whole: int  # of those, what all ranks of tp have alike; experts apart


@lru_cache(maxsize=1 << 14)
def stage_shares(model: ModelConfig, mesh: Mesh, stage: int) -> Shares:
    """The shares of the first rank of a stage, which has the most."""
    layer, root = layer_parameters(model), stage_root(model, mesh, stage)
    own = stage_parameters(model, mesh, stage)
    experts = own.experts.gathered(mesh)
    return Shares(
        own.kept(mesh),
        layer.gathered(mesh),
        root.gathered(mesh),
        own.gathered(mesh) - experts,
        experts,
        own.whole.gathered(mesh),
    )


def share(amount: int, ranks: int) -> int:
    """The largest of `ranks` shares."""
    return -(-amount // ranks)
