"""The mesh: how the ranks of a run share the work, as a recipe gives it.

    pp             pipeline stages, each some of the layers
    dp_replicate   copies that share no weights and average gradients (HSDP's outer dimension)
    dp_shard       ranks that share weights, gradients and optimizer state, with rows of their own
    cp             ranks that share the tokens of their rows; attention by heads (Ulysses,
                   Jacobs et al. 2023)
    tp             ranks that share each matrix (Shoeybi et al. 2019), and tokens between them
    ep             ranks, neighbours in dp_shard x cp x tp, that share the routed experts of a layer

Ranks are numbered with tp fastest and pp slowest, so that those which talk most are on one host.
All but `ep` multiply to the world size. Weights are sharded over dp_shard and cp together: ranks
that share tokens have the same weights to keep.
"""

from __future__ import annotations

from typing import Any

from pydantic import Field

from qwen2.common.config import Config
from qwen2.common.errors import UserError
from qwen2.model.config import ModelConfig

ORDER = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""From the slowest to the fastest dimension."""


class Mesh(Config):
    """Sizes of a mesh's dimensions; by default all ranks are in `dp_shard`."""

    pp: int = Field(default=1, gt=0)
    dp_replicate: int = Field(default=1, gt=0)
    dp_shard: int | None = Field(default=None, gt=0)
    """None: the ranks that the other dimensions leave."""
    cp: int = Field(default=1, gt=0)
    tp: int = Field(default=1, gt=0)
    ep: int = Field(default=1, gt=0)

    @property
    def dp(self) -> int:
        """Ranks that read rows of their own; of a mesh that is resolved."""
        assert self.dp_shard is not None
        return self.dp_replicate * self.dp_shard

    @property
    def fsdp(self) -> int:
        """Ranks that share weights; of a mesh that is resolved."""
        assert self.dp_shard is not None
        return self.dp_shard * self.cp

    @property
    def world_size(self) -> int:
        """Ranks; of a mesh that is resolved."""
        return self.pp * self.dp * self.cp * self.tp

    def sizes(self) -> dict[str, int]:
        """Dimension -> size, in the order of the ranks' numbers; of a mesh that is resolved."""
        return {name: getattr(self, name) for name in ORDER}

    def resolve(self, world_size: int, model: ModelConfig, context: int) -> Mesh:
        """This mesh over `world_size` ranks, with nothing left open.

        Args:
            context: tokens of a row.

        Raises:
            UserError: the ranks or the model cannot be divided so; says which and what would do.
        """
        fixed = self.pp * self.dp_replicate * self.cp * self.tp
        shard = self.dp_shard or max(world_size // fixed, 1)
        if fixed * shard != world_size:
            said = " x ".join(f"{n} {v}" for n in ORDER if (v := getattr(self, n)) not in (1, None))
            raise UserError(
                f"mesh: {said or 'one rank'} is {fixed * shard} ranks, but the world has "
                f"{world_size}; start as many, or leave dp_shard out to take what is left"
            )
        resolved = self.model_copy(update={"dp_shard": shard})
        for problem in resolved.problems(model, context):
            raise UserError(f"mesh: {problem}")
        return resolved

    def problems(self, model: ModelConfig, context: int) -> list[str]:
        """Why `model` cannot be divided over this mesh, which is resolved, and what would do."""
        H, K, L = model.num_attention_heads, model.num_key_value_heads, model.num_hidden_layers
        found = []

        def check(good: Any, problem: str) -> None:
            if not good:
                found.append(problem)

        check(
            K % self.tp == 0,
            f"tp {self.tp} does not divide the {K} key-value heads; choose a divisor of {K}",
        )
        queries, keys = H // self.tp, max(K // self.tp, 1)
        check(
            queries % self.cp == 0 and (keys % self.cp == 0 or self.cp % keys == 0),
            f"cp {self.cp} does not divide the {queries} query and {keys} key-value heads that tp "
            f"{self.tp} leaves a rank; choose less of one",
        )
        check(
            context % (self.cp * self.tp) == 0,
            f"context {context} is no multiple of cp x tp = {self.cp * self.tp}; choose one",
        )
        experts = model.moe.num_experts if model.moe else 0
        check(
            self.ep == 1 or experts,
            f"ep {self.ep}, but the model is dense and has no experts; leave ep out",
        )
        check(
            not experts or experts % self.ep == 0,
            f"ep {self.ep} does not divide the {experts} experts; choose a divisor",
        )
        check(
            self.fsdp % self.ep == 0,
            f"ep {self.ep} does not divide dp_shard x cp = {self.fsdp}, whose ranks share the "
            "experts; choose a divisor",
        )
        check(
            self.pp <= L,
            f"pp {self.pp} is more stages than the model's {L} layers; choose fewer",
        )
        check(
            self.pp == 1 or not model.tie_word_embeddings,
            f"pp {self.pp}: embedding and head are one tensor (tie_word_embeddings), which cannot "
            "be in the first and the last stage; leave pp out: such models are small",
        )
        return found
