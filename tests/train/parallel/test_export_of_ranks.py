"""The model that is exported from the shards of many ranks is that of one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qwen2.model import hub
from qwen2.model.config import Mixture, ModelConfig
from qwen2.model.decoder import Qwen2, init_weights
from qwen2.tokenizer import Tokenizer
from qwen2.train.checkpointer import Checkpointer
from qwen2.train.checkpoints import RunState
from qwen2.train.export import export
from qwen2.train.loop import LoopSettings
from qwen2.train.mesh import Mesh
from qwen2.train.optimizers import AdamWConfig
from qwen2.train.parallelise import parallelise
from qwen2.train.world import World

RunInRanks = Callable[..., list[Any]]
SHAPE: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
MOE = Mixture(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=24,
)


def new_model(changes: dict[str, Any]) -> Qwen2:
    model = Qwen2(ModelConfig(**SHAPE, **changes))
    init_weights(model, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():  # biases are 0, and would see the smallest update
            parameter.add_(1)
    return model


def save(folder: Path, sizes: dict[str, int], changes: dict[str, Any]) -> None:
    """In a rank: a checkpoint of its share of the model, after an update too small to see."""
    model = new_model(changes)
    config = model.config
    world = World(Mesh(**sizes).resolve(dist.get_world_size(), config, 16), torch.device("cpu"))
    parallelise(model, world, torch.float32)
    masters = dict(model.named_parameters())
    optimizer = AdamWConfig(lr=1e-30).build(masters)
    for master in masters.values():
        master.grad = torch.ones_like(master)
    optimizer.step()
    with Checkpointer(folder, 1, None, True) as checkpoints:
        checkpoints.save(RunState(1), masters, optimizer, {}, LoopSettings(), config)


@pytest.mark.parametrize(
    ("count", "sizes", "changes"),
    [
        (2, {}, {"tie_word_embeddings": True}),
        (2, {"tp": 2}, {}),
        (2, {"ep": 2}, {"moe": MOE}),
        pytest.param(4, {"tp": 2}, {}, marks=pytest.mark.slow),
        pytest.param(4, {"dp_replicate": 2}, {}, marks=pytest.mark.slow),
        pytest.param(4, {"tp": 2, "ep": 2}, {"moe": MOE}, marks=pytest.mark.slow),
    ],
)
def test_the_bytes_are_those_of_saving_the_whole_model(
    count: int, sizes: dict[str, int], changes: dict[str, Any], in_ranks: RunInRanks, tmp_path: Path
) -> None:
    in_ranks(count, save, tmp_path / "run", sizes, changes)
    control = {"<|endoftext|>": 256, "<|im_start|>": 257, "<|im_end|>": 258}
    tokenizer = Tokenizer.from_ranks({bytes([i]): i for i in range(256)}, control)
    hub.save(new_model(changes), tokenizer, tmp_path / "saved", max_shard_bytes=20_000)
    step, out = tmp_path / "run/step-00000001", tmp_path / "out"
    export(step, out, tokenizer, torch.float32, max_shard_bytes=20_000)
    files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
